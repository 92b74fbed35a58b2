"""The report a person reads: one HTML file that needs no network and runs no script."""

import json
from pathlib import Path

import yaml

from ...human_units import human_bytes, number, percent, times
from ...refusal import Refusal
from ..report import Continuation, Report
from ..report.donor_and_student import quality_and_cost
from ..report.forms import change
from ..report.table import Cells, Table, caption_of, cells_of
from ..report.tables import (
    BY_CONTEXT,
    BY_SOURCE_LENGTH,
    CAPACITY,
    ENCODING_SPEED,
    RETRIEVAL,
    ROUGE,
    SPEED,
    TASKS,
)
from ..report.verdict import verdict
from ..report.words import words_of
from .html import block, bullets, details, element, section, table, text_of
from .plots import capacity_plots, context_plots, retrieval_plots, speed_plots, task_plots
from .style import STYLE


# Nothing may be fetched or run, even if a hole were found in what `text_of` does.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
DONOR_KEY, STUDENT_KEY = ("donor", "●", "donor"), ("student", "■", "student")


def write_page(report: Report, path: Path) -> None:
    """Raises Refusal if something is there already."""
    if path.exists():
        raise Refusal(f"{path}: exists. Remove it, or give another path.")
    path.write_text(make_page(report), encoding="utf-8", newline="\n")


def make_page(report: Report) -> str:
    """The same report gives the same text."""
    title = f"{report.student.name} against its donor {report.donor.name}"
    sections = [
        _summary(report),
        _context(report),
        _by_source_length(report),
        _rouge(report),
        _retrieval(report),
        _tasks(report),
        _speed(report),
        _encoding_speed(report),
        _capacity(report),
        _continuations(report),
        _making(report),
        _settings(report),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.settings.versions.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{text_of(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text_of(title)}</h1>\n{''.join(sections)}</main>\n"
        f"<footer>{text_of(f'Written by hf_gqa. {versions}')}</footer>\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    notes = section("What to know about these numbers", bullets(report.notes)) if report.notes else ""
    return (
        element("p", text_of(verdict(report)), class_="verdict")
        + _figures(report)
        + table(quality_and_cost(report), "Donor and student on the same text")
        + notes
    )


def _figures(report: Report) -> str:
    """The few that decide, large."""
    donor, student = report.donor, report.student
    figures = []
    if donor.cache_bytes_per_token_measured and student.cache_bytes_per_token_measured:
        ratio = donor.cache_bytes_per_token_measured / student.cache_bytes_per_token_measured
        figures.append((times(ratio), "as many tokens in the same cache"))
    if report.speed:
        low, high = (times(pick(row.decode_speedup for row in report.speed)) for pick in (min, max))
        figures.append((low if low == high else f"{low} to {high}", "decode speed"))
    if report.encoding_speed:
        low, high = (times(pick(row.speedup for row in report.encoding_speed)) for pick in (min, max))
        figures.append((low if low == high else f"{low} to {high}", "speed of reading"))
    if donor.loss_nats_per_token is not None:
        figures.append((change(student.loss_nats_per_token - donor.loss_nats_per_token), "nats per token of loss"))
        figures.append((percent(report.top1_agreement_fraction), "same likeliest token"))
    if report.embeddings is not None:
        figures.append((number(report.embeddings.mean_cosine), "cosine of the embeddings"))
    shown = "".join(f"<div><dd>{text_of(value)}</dd><dt>{text_of(name)}</dt></div>" for value, name in figures)
    return element("dl", shown, class_="figures")


def _numbers(described: Table, report: Report) -> str:
    return table(cells_of(described, report), caption_of(described, report))


def _plots(keys: list[tuple[str, str, str]], plots: list[str]) -> str:
    """Beside one another where there is room, under what their marks mean."""
    if not plots:
        return ""
    said = "".join(
        element("li", f'<b class="{color}" aria-hidden="true">{mark}</b> {text_of(name)}') for color, mark, name in keys
    )
    return element("ul", said, class_="key") + element("div", "".join(plots), class_="plots")


def _context(report: Report) -> str:
    if not report.by_context:
        return ""
    keys = [DONOR_KEY, STUDENT_KEY, ("student", "▒", "interval of the difference"), ("third", "▲", "KL to the donor")]
    plots = _plots(keys, context_plots(report))
    return section("Loss by context length", plots, details("The numbers", _numbers(BY_CONTEXT, report)))


def _by_source_length(report: Report) -> str:
    if not report.by_source_length:
        return ""
    return section("Loss by length of the source", _numbers(BY_SOURCE_LENGTH, report))


def _rouge(report: Report) -> str:
    if not report.rouge:
        return ""
    one = report.rouge[0]
    way = "greedy decoding" if one.num_beams == 1 else f"beam search over {one.num_beams} beams"
    said = (
        f"What both write for {one.pairs:,} sources by {way}, stopped after {one.most_tokens:,} tokens, against the "
        "references; of several the one that fits best."
    )
    return section("ROUGE", element("p", text_of(said)), _numbers(ROUGE, report))


def _encoding_speed(report: Report) -> str:
    if not report.encoding_speed:
        return ""
    said = f"{_timing(report, max(row.repetitions for row in report.encoding_speed))}, of one forward pass."
    return section("Speed of reading", element("p", text_of(said)), _numbers(ENCODING_SPEED, report))


def _timing(report: Report, repetitions: int) -> str:
    settings = report.settings
    return (
        f"Medians of {repetitions} pairs, donor and student by turns, on {settings.device} ({settings.device_name}) in "
        f"{settings.dtype} with {settings.attn_implementation} attention"
    )


def _retrieval(report: Report) -> str:
    if not report.retrieval:
        return ""
    said = "Something is said once in the context and asked for at its end. Averages of loss do not show whether that works."
    plots = _plots([DONOR_KEY, STUDENT_KEY], retrieval_plots(report))
    return section("Retrieval", element("p", said), plots, details("The numbers", _numbers(RETRIEVAL, report)))


def _tasks(report: Report) -> str:
    if not report.tasks:
        return ""
    return section("Tasks", _plots([DONOR_KEY, STUDENT_KEY], task_plots(report)), _numbers(TASKS, report))


def _speed(report: Report) -> str:
    if not report.speed:
        return ""
    said = (
        f"{_timing(report, max(row.repetitions for row in report.speed))}. Bars reach from the "
        "smallest to the largest pair. Allowed is what fewer bytes of weights and cache per step would give if nothing "
        "else took time."
    )
    keys = [DONOR_KEY, STUDENT_KEY, ("third", "▲", "allowed by the bytes moved")]
    plots = _plots(keys, speed_plots(report))
    return section("Speed", element("p", text_of(said)), plots, details("The numbers", _numbers(SPEED, report)))


def _capacity(report: Report) -> str:
    if not report.capacity:
        return ""
    limit = report.text.longest_context_tokens
    said = f"Computed from weights and cache in {report.settings.dtype}."
    keys = [DONOR_KEY, STUDENT_KEY]
    if limit:
        said += f" The model itself takes at most {limit:,} tokens."
        keys.append(("third", "┆", "what the model takes"))
    plots = _plots(keys, capacity_plots(report))
    return section("Capacity", element("p", text_of(said)), plots, details("The numbers", _numbers(CAPACITY, report)))


def _continuations(report: Report) -> str:
    if not report.continuations:
        return ""
    words = words_of(report)
    said = [_continuation(words.prompt, number, one) for number, one in enumerate(report.continuations, start=1)]
    return section(words.continuations, *said)


def _continuation(heading: str, number: int, one: Continuation) -> str:
    texts = [("donor", one.donor), ("converted, before uptraining", one.converted), ("student", one.student)]
    texts.insert(0, ("reference", one.reference))
    columns = "".join(
        element("div", element("h4", text_of(who)) + block(text, f"{who}, prompt {number}"))
        for who, text in texts
        if text is not None
    )
    prompt = block(one.prompt, f"prompt {number}")
    return element("h3", f"{heading} {number}") + prompt + element("div", columns, class_="texts")


def _making(report: Report) -> str:
    """How the student was made, and how to see these numbers again."""
    recipe = element("h3", "Recipe") + block(_as_yaml(report.recipe), "recipe") if report.recipe else ""
    conversion = ""
    if report.conversion:
        conversion = details("Record of the conversion", block(_as_yaml(report.conversion), "record of the conversion"))
    again = element("h3", "The same numbers again") + block(report.command, "command")
    return section("How it was made", recipe, conversion, again)


def _as_yaml(values: dict) -> str:
    plain = json.loads(json.dumps(values))  # tuples, which YAML does not know, as lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _reading(report: Report) -> list[tuple[str, str]]:
    """How the text was read, which is another thing for each kind of model."""
    text = report.text
    if text.targets is not None:
        return [
            ("references, each scored", f"{text.targets:,}"),
            ("most tokens of a source", f"{text.context_tokens:,}"),
            ("sources that were cut there", f"{text.truncated_sources:,}"),
        ]
    rows = [("windows", f"{text.windows:,}")]
    if text.stride_tokens is None:
        rows.append(("most tokens of a window", f"{text.context_tokens:,}"))
    else:
        rows.append(("longest context of a prediction, tokens", f"{text.context_tokens:,}"))
        rows.append(("tokens scored in a window", f"{text.stride_tokens:,}"))
    if text.masked_fraction is not None:
        rows.append(("tokens that were masked", percent(text.masked_fraction)))
    return rows


def _settings(report: Report) -> str:
    text, settings = report.text, report.settings
    of_text = [
        ("sources", ", ".join(text.sources)),
        ("fingerprint", text.fingerprint),
        ("documents", f"{text.documents:,}"),
        (words_of(report).tokens, f"{text.tokens:,}"),
        ("size", human_bytes(text.text_bytes)),
        *_reading(report),
        ("the model takes, tokens", f"{text.longest_context_tokens:,}" if text.longest_context_tokens else "no limit"),
    ]
    of_run = [
        ("device", f"{settings.device} ({settings.device_name}), {settings.threads} threads"),
        ("dtype", settings.dtype),
        ("batch size", f"{settings.batch_size}"),
        ("attention", settings.attn_implementation),
        ("seed", f"{settings.seed}"),
        (
            "intervals",
            f"{settings.confidence_fraction:.0%}, {settings.resamples:,} resamples of {words_of(report).drawn}",
        ),
        *((name, version) for name, version in settings.versions.items()),
    ]
    return section(
        "Text and settings",
        table(Cells(("", "text"), of_text), "Text"),
        table(Cells(("", "setting"), of_run), "Settings"),
    )
