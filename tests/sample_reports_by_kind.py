"""Reports with invented values of an encoder-decoder and of encoders, for the tests of what shows a report."""

from dataclasses import replace

from hf_gqa.evaluate.measuring.measured import NO_DIFFERENCES
from hf_gqa.evaluate.report import Continuation, Embeddings, EncodingSpeed, Interval, Report, Rouge, SourceLengthLoss

from .sample_report import sample_report


NOTHING = {"by_context": (), "retrieval": (), "tasks": ()}
NO_CACHE = {f"cache_bytes_per_token_{name}": None for name in ("computed", "measured", "beyond_window")}


def seq2seq_report() -> Report:
    report = sample_report()
    heads = {"cross_num_key_value_heads": (2,) * 6, "encoder_num_key_value_heads": (8,) * 4}
    cross = {"cache_bytes_per_source_token_computed": 3072, "cache_bytes_per_source_token_measured": 3072.0}
    before = {name: 4 * value for name, value in cross.items()}
    kind = {"model_type": "t5", "model_class": "T5ForConditionalGeneration"}
    rouges = {"rouge1": (0.412, 0.387), "rouge2": (0.203, 0.181), "rougeL": (0.351, 0.322)}
    return replace(
        report,
        **NOTHING,
        kind="seq2seq",
        donor=replace(report.donor, **kind, **before, **heads | {"cross_num_key_value_heads": (8,) * 6}),
        student=replace(report.student, **kind, **cross, **heads),
        by_source_length=tuple(_source_length(*lengths) for lengths in ((17, 32), (33, 64), (65, 119))),
        rouge=tuple(
            Rouge(
                metric=metric,
                pairs=618,
                num_beams=1,
                most_tokens=96,
                donor_fraction=donor,
                student_fraction=student,
                difference=Interval(value=student - donor, low=student - donor - 0.011, high=student - donor + 0.0093),
            )
            for metric, (donor, student) in rouges.items()
        ),
        continuations=(
            Continuation(prompt="A <b>source</b>", donor="It ends.", student="It ended.", reference="The end."),
        ),
        text=replace(report.text, stride_tokens=None, targets=722, truncated_sources=19),
    )


def _source_length(first: int, last: int) -> SourceLengthLoss:
    return SourceLengthLoss(
        first_source_tokens=first,
        last_source_tokens=last,
        pairs=211 + last,
        tokens=7 * last + 113,
        donor_loss_nats_per_token=2.91 + first / 1000,
        student_loss_nats_per_token=3.02 + first / 400,
        kl_nats_per_token=0.121,
        difference=Interval(value=0.11 + first / 700, low=0.0913 + first / 700, high=0.134 + first / 700),
    )


def masked_report() -> Report:
    report = sample_report()
    kind = {"model_type": "bert", "model_class": "BertForMaskedLM", "bits_per_byte": None, **NO_CACHE}
    return replace(
        report,
        **NOTHING,
        capacity=(),
        kind="masked_lm",
        donor=replace(report.donor, **kind),
        student=replace(report.student, **kind),
        differences=replace(report.differences, bits_per_byte=None),
        speed=(),
        continuations=(),
        embeddings=Embeddings(
            windows=240,
            mean_cosine=0.9713,
            cosine=Interval(value=0.9713, low=0.9688, high=0.9737),
            spearman=0.8846,
            spearman_windows=240,
        ),
        encoding_speed=tuple(
            EncodingSpeed(
                batch_size=batch,
                length_tokens=128,
                repetitions=5,
                donor_sequences_per_second=33.7 * batch,
                student_sequences_per_second=36.2 * batch,
                speedup=1.074,
                speedup_low=1.012,
                speedup_high=1.133,
            )
            for batch in (1, 16)
        ),
        text=replace(report.text, stride_tokens=None, masked_fraction=0.15),
    )


def encoder_report() -> Report:
    report = masked_report()
    no_loss = {"loss_nats_per_token": None, "perplexity": None, "model_class": "BertModel"}
    return replace(
        report,
        kind="encoder",
        donor=replace(report.donor, **no_loss),
        student=replace(report.student, **no_loss),
        kl_nats_per_token=None,
        top1_agreement_fraction=None,
        differences=NO_DIFFERENCES,
        text=replace(report.text, masked_fraction=None),
    )
