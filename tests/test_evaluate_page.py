"""The page: one file, nothing fetched, nothing executed, readable in a real browser; and the same in the terminal."""

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from hf_gqa.cli.report_tables import print_report
from hf_gqa.evaluate.page.page import make_page, write_page
from hf_gqa.evaluate.page.write_report import write_report
from hf_gqa.evaluate.report import Differences, Interval
from hf_gqa.evaluate.report.verdict import verdict
from hf_gqa.refusal import Refusal

from .balanced_page import Balanced
from .sample_report import sample_report


EVIL = "<script>document.title='run'</script>\"'><img src=x onerror=alert(1)> & `x` | $x$ \x00\x1b[31m"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def test_one_file_that_fetches_and_runs_nothing():
    page = make_page(sample_report())
    read = Balanced(page)
    assert "script" not in read.tags and "link" not in read.tags and "iframe" not in read.tags
    assert all(link.startswith("#") for link in read.links)
    assert len(read.ids) == len(set(read.ids)) and {link[1:] for link in read.links} <= set(read.ids)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page) and "default-src 'none'" in page
    assert len(page.encode()) < 400_000 and page.count("<svg") >= 6
    headings = [int(tag[1]) for tag in read.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))


def test_same_report_same_bytes(tmp_path):
    write_page(sample_report(), tmp_path / "a.html")
    write_page(sample_report(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    with pytest.raises(Refusal, match=r"a\.html: exists\. Remove it, or give another path\."):
        write_page(sample_report(), tmp_path / "a.html")


def evil_report():
    report = sample_report()
    written = [replace(one, prompt=EVIL, donor=EVIL, student=EVIL) for one in report.continuations]
    named = {side: replace(getattr(report, side), name=EVIL) for side in ("donor", "student")}
    tasks = tuple(replace(task, task=EVIL) for task in report.tasks)
    retrieval = tuple(replace(row, task=EVIL) for row in report.retrieval)
    more = {"notes": (EVIL,), "command": EVIL, "recipe": {EVIL: EVIL}, "conversion": {"plan": EVIL}}
    return replace(report, continuations=tuple(written), tasks=tasks, retrieval=retrieval, **named, **more)


def test_what_comes_from_outside_is_text():
    page = make_page(evil_report())
    read = Balanced(page)
    assert "script" not in read.tags and "img" not in read.tags and "\x00" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page


def test_sections_without_data_are_left_out():
    report = sample_report(by_context=(), retrieval=(), tasks=(), speed=(), capacity=(), continuations=(), notes=())
    page = make_page(replace(report, recipe=None, conversion=None))
    Balanced(page)
    assert "<svg" not in page
    for heading in ("Loss by context", "Retrieval", "Tasks", "Speed", "Capacity", "What they write", "Recipe"):
        assert f">{heading}" not in page, heading


def test_capacity_without_end_and_without_room():
    (first, *_) = sample_report().capacity
    rows = (
        replace(first, donor_context_tokens=0),
        replace(first, donor_context_tokens=None, student_context_tokens=None),
    )
    page = make_page(sample_report(capacity=rows))
    assert "none" in page and "unbounded" in page


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


def with_loss(found: Interval | None):
    report = sample_report()
    student = replace(
        report.student, loss_nats_per_token=report.donor.loss_nats_per_token + (found.value if found else 0.1)
    )
    kept = {name: getattr(report.differences, name) for name in Differences.__dataclass_fields__}
    return replace(report, student=student, differences=Differences(**kept | {"loss_nats_per_token": found}))


def test_verdict_says_what_the_numbers_say():
    said = verdict(with_loss(interval(0.05, 0.15)))
    assert "The cache is 4x smaller (12 KiB to 3 KiB per token)" in said and "costs 0.1 nats per token" in said
    assert "95% interval 0.05 to 0.15" in said
    assert "no difference" in verdict(with_loss(interval(-0.02, 0.02))).lower()
    assert "interval" in verdict(with_loss(None)) and "0.05 to" not in verdict(with_loss(None))


def test_verdict_says_that_recall_fell_where_the_donor_had_it():
    report = sample_report()
    row = replace(report.retrieval[0], samples=100, donor_accuracy_fraction=0.95, student_accuracy_fraction=0.4)
    said = verdict(replace(report, retrieval=(row,)))
    assert row.task in said and "95%" in said and "40%" in said
    same = replace(row, student_accuracy_fraction=0.95, difference=None)
    assert "40%" not in verdict(replace(report, retrieval=(same,)))


def test_the_terminal_shows_the_same(capsys):
    print_report(sample_report())
    printed = capsys.readouterr().out
    for words in (
        "perplexity",
        "cache per token, measured",
        "recall",
        "by tokens of context",
        "speed",
        "KL",
        "tokens that fit",
    ):
        assert words in printed
    assert verdict(sample_report()) in printed.replace("\n", " ")
    print_report(sample_report(retrieval=(), speed=(), tasks=()))
    assert "recall" not in capsys.readouterr().out.partition("The cache")[0]


def test_a_folder_with_both_or_nothing(tmp_path, monkeypatch):
    write_report(sample_report(), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.html"}

    def fail(report, path):
        raise OSError("disk full")

    monkeypatch.setattr("hf_gqa.evaluate.page.write_report.write_page", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(sample_report(kl_nats_per_token=9.0), tmp_path / "report", overwrite=True)
    assert '"kl_nats_per_token": 9.0' not in (tmp_path / "report" / "report.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs a real browser without a window; its profile is its own."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    folder = tmp_path_factory.mktemp("browser")

    def run(page: Path, *options: str) -> str:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
        flags += [f"--user-data-dir={folder}/profile", *options, page.as_uri()]
        done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    return run


@pytest.mark.slow
def test_in_a_browser_it_is_light_and_dark_and_fits_a_phone(browse, tmp_path):
    page = tmp_path / "report.html"
    write_page(evil_report(), page)
    brightness = {}
    for name, options in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        shot = tmp_path / f"{name}.png"
        browse(page, f"--screenshot={shot}", "--window-size=1000,3000", *options)
        pixels = imread(shot)[..., :3]
        brightness[name] = float(np.median(pixels.mean(axis=-1)))
        assert pixels.std() > 0.05, "nothing is drawn"
    assert brightness["light"] > 0.85 and brightness["dark"] < 0.25
    measured = page.read_text().replace(
        "</body>",
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, document.title].join(' ')</script></body>",
    )
    probe = tmp_path / "probe.html"
    probe.write_text(re.sub(r"<meta http-equiv=.*?>", "", measured))
    title = re.search(
        r"<title>(\d+) (\d+) (.*?)</title>", browse(probe, "--dump-dom", "--window-size=500,900"), re.DOTALL
    )
    assert int(title[1]) <= int(title[2]), "the page scrolls sideways"
    assert "&lt;script&gt;" in title[3], "a name was executed"
