"""How the page looks: on a phone, on a desk, by day and by night."""

# Donor and student are told apart by colour-blind people too (Okabe and Ito's blue and orange), and by shape.
STYLE = """
:root { color-scheme: light dark;
  --ground: #fff; --panel: #f5f6f8; --ink: #1c2128; --quiet: #57606a; --line: #d4d9df;
  --donor: #0067a5; --student: #c24e00; --third: #6b7280; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171c; --panel: #1d2128; --ink: #e4e8ee; --quiet: #a3adba; --line: #3a414c;
  --donor: #63b9f0; --student: #f5a13d; --third: #a3adba; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main, footer { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
ul { padding-left: 1.25rem; }
.verdict { font-size: 1.1rem; padding: .9rem 1.1rem; margin: 1rem 0; max-width: none;
  background: var(--panel); border-left: .3rem solid var(--student); border-radius: .3rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0; padding: 0; }
.figures div { background: var(--panel); border-radius: .3rem; padding: .7rem .9rem; }
.figures dd { margin: 0; font-size: 1.45rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dt, .quiet, footer, caption { color: var(--quiet); font-size: .875rem; }
.scrolls { overflow-x: auto; margin: .75rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: min(100%, 34rem); }
caption { text-align: left; padding-bottom: .35rem; }
th, td { text-align: right; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.25rem 2rem; margin: 1rem 0; }
.plots svg { width: 100%; height: auto; max-width: 36rem; }
svg * { stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; color: var(--quiet); font-size: .875rem; }
.key b { font-weight: 400; }
.donor { color: var(--donor); } .student { color: var(--student); } .third { color: var(--third); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--quiet); padding: .3rem 0; }
pre { background: var(--panel); border-radius: .3rem; padding: .8rem 1rem; margin: .5rem 0; max-height: 30rem; overflow: auto;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: .75rem; }
.texts h4 { margin: 0; font-size: .875rem; font-weight: 600; }
:focus-visible { outline: 2px solid var(--donor); outline-offset: 2px; }
@media print { details > * { display: revert; } pre { max-height: none; } }
"""
