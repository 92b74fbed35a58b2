"""The sentences of a card: what the student is, on what it was measured and on what not, how to repeat it."""

import yaml

from ..convert.model_kind import CAUSAL_LM, ENCODER, MASKED_LM, SEQ2SEQ
from ..evaluate.report import Report
from ..evaluate.report.verdict import confidence
from ..human_units import heads_in_words, human_count, percent
from ..runtime.layer_plan import LayerPlan
from .licence import Licence
from .markdown import block, code, plain
from .sharing_words import sharing_notes


def facts(report: Report, licence: Licence) -> list[str]:
    """Donor, heads, method, training and licence, a line each."""
    conversion = report.conversion or {}
    before, after = (heads_in_words(model.num_key_value_heads) for model in (report.donor, report.student))
    lines = [
        f"Donor: {_donor(report)}",
        f"KV heads of a layer: {after} instead of {before}, for {report.student.num_attention_heads} query heads "
        f"({report.student.num_hidden_layers} layers, {plain(report.student.model_class)})",
        f"Made with hf-gqa by {_method(conversion)}",
        *(note.rstrip(".") for note in sharing_notes(_rows(conversion), _shared_init(conversion))),
        _uptraining(report.conversion),
        f"Licence: {_licence(licence)}",
    ]
    return [f"{line}." for line in lines]


def measured_text(report: Report) -> str:
    text = report.text
    documents = "1 document" if text.documents == 1 else f"{text.documents:,} documents"
    return (
        f"{text.tokens:,} tokens ({text.text_bytes:,} bytes, {documents}, fingerprint {code(text.fingerprint)}) "
        f"of {', '.join(code(source) for source in text.sources)}, {_how_read(report)}"
    )


def _how_read(report: Report) -> str:
    text = report.text
    if report.kind == SEQ2SEQ:
        cut = f", {text.truncated_sources:,} of which were cut to that" if text.truncated_sources else ""
        return (
            f"every token of {text.targets:,} targets scored once, given the target's tokens before it and a source of up to "
            f"{text.context_tokens:,} tokens{cut}"
        )
    if report.kind == MASKED_LM:
        return (
            f"{percent(text.masked_fraction)} of the text, masked by a seed and each guessed once, in {text.windows:,} windows "
            f"of up to {text.context_tokens:,} tokens"
        )
    if report.kind == ENCODER:
        return f"embedded in {text.windows:,} windows of up to {text.context_tokens:,} tokens"
    return (
        f"every token scored once, in {text.windows:,} windows with up to {text.context_tokens:,} tokens before the one that is "
        f"predicted"
    )


def machine(report: Report) -> str:
    found = report.settings
    return (
        f"{plain(found.device_name)} ({plain(found.device)}), {plain(found.dtype)}, attention "
        f"{code(found.attn_implementation)}, {found.threads} threads"
    )


def limits(report: Report) -> list[str]:
    """What the numbers do not say."""
    sources = ", ".join(code(source) for source in report.text.sources)
    lines = [
        f"Quality was measured on {sources} alone; on other text, languages or code it may be worse.",
        _lengths(report),
    ]
    if not report.retrieval and report.kind == CAUSAL_LM:
        lines.append("Recall from the context was not measured; it is what merged heads lose first.")
    if not report.tasks and report.kind == CAUSAL_LM:
        lines.append("No task of a benchmark was run.")
    if not report.speed and not report.encoding_speed:
        lines.append("Speed was not measured.")
    else:
        lines.append("Speeds are those of one machine and its load; on another they differ.")
    if report.student.peak_memory_bytes is None:
        lines.append("Peak memory was not measured.")
    lines.append(
        "Not measured by this evaluation: safety, bias, truthfulness, instruction following. Whatever limits the donor has, "
        "expect them here too, and read its own card."
    )
    return lines + [plain(note) for note in report.notes]


def recipe(report: Report) -> str:
    """The recipe that made it all; where there was none, the plan of the conversion."""
    conversion = report.conversion or {}
    values = report.recipe or {
        key: conversion[key] for key in ("plan", "uptraining") if conversion.get(key) is not None
    }
    if not values:
        return "How it was made is not recorded."
    return block(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "yaml")


def command(report: Report) -> str:
    return block(report.command, "bash")


def settings(report: Report) -> str:
    found = report.settings
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in found.versions.items())
    return (
        f"In {plain(found.dtype)} at batch size {found.batch_size}, seed {found.seed}; intervals hold {confidence(report)} of "
        f"{found.resamples:,} resamples; {versions}."
    )


def _donor(report: Report) -> str:
    recorded = (report.conversion or {}).get("donor") or {}
    name = code(recorded.get("name") or report.donor.name)
    if recorded.get("revision"):
        return f"{name} at commit {code(recorded['revision'])}"
    hashes = recorded.get("weights_sha256") or {}
    if not hashes:
        return name
    listed = ", ".join(f"{code(file)} {code(sha)}" for file, sha in list(hashes.items())[:1])
    more = f" and {len(hashes) - 1} more in the manifest" if len(hashes) > 1 else ""
    return f"{name}, a folder whose weights have the SHA-256 {listed}{more}"


def _method(conversion: dict) -> str:
    plan = conversion.get("plan") or {}
    methods = plan.get("method") or ["a method that is not recorded"]
    named = ", then ".join(code(method) for method in ([methods] if isinstance(methods, str) else methods))
    shared = plan.get("sharing", "own")
    exported = {"native": "the donor's own class", "bundle": "a bundle with its own code"}.get(conversion.get("export"))
    return (
        named
        + ("" if shared == "own" else f", layers sharing by {code(shared)}")
        + (f", as {exported}" if exported else "")
    )


def _shared_init(conversion: dict) -> str:
    return (conversion.get("plan") or {}).get("shared_init", "own")


def _rows(conversion: dict) -> list[LayerPlan]:
    return [LayerPlan.from_dict(row) for row in conversion.get("layer_plan") or []]


def _uptraining(conversion: dict | None) -> str:
    if conversion is None:
        return "Whether it was trained after its conversion is not recorded"
    trained = conversion.get("uptraining")
    if not trained:
        return "Not trained after its conversion"
    tokens = trained.get("tokens_seen")
    if not isinstance(tokens, int):
        return "Uptrained after its conversion, on a number of tokens that is not recorded"
    return f"Uptrained after its conversion on {human_count(tokens)} ({tokens:,}) tokens"


def _licence(licence: Licence) -> str:
    stated = licence.license_name or licence.license
    source = plain(licence.source)
    return f"{code(stated)}, {source}" if stated else source


def _lengths(report: Report) -> str:
    measured, longest = report.text.context_tokens, report.text.longest_context_tokens
    if report.kind != CAUSAL_LM:
        what = "Sources" if report.kind == SEQ2SEQ else "Windows"
        takes = f"; the model takes {longest:,}" if longest is not None and longest > measured else ""
        return f"{what} of more than {measured:,} tokens were not measured{takes}."
    if longest is None:
        return f"Contexts of more than {measured:,} tokens were not measured."
    if measured + 1 < longest:
        return f"Contexts of more than {measured:,} tokens were not measured; the model takes {longest:,}."
    return f"Contexts were measured up to the {longest:,} tokens that the model takes, and not beyond."
