"""A report with invented values in every field, for the tests of what shows a report: page, terminal, card."""

from dataclasses import replace

from hf_gqa.evaluate.report import (
    FORMAT,
    Capacity,
    ContextLoss,
    Continuation,
    Differences,
    Interval,
    ModelFacts,
    Report,
    Retrieval,
    Settings,
    Speed,
    TaskScore,
    TextFacts,
)


DONOR_BY_CONTEXT = (4.61, 4.02, 3.67, 3.41, 3.24, 3.11, 3.02, 2.98, 2.95)
STUDENT_BY_CONTEXT = (4.66, 4.09, 3.74, 3.49, 3.33, 3.21, 3.13, 3.11, 3.12)


def sample_report(**changes) -> Report:
    """Of a donor with 8 KV heads and its student with 2, invented throughout; `changes` are fields of the report."""
    return replace(_report(), **changes)


def sample_model(name: str, heads: int, loss: float, perplexity: float, **changes) -> ModelFacts:
    """A Llama of 6 layers, evaluated in float32."""
    bytes_per_token = 6 * 2 * heads * 32 * 4
    facts = ModelFacts(
        name=name,
        model_type="llama",
        model_class="LlamaForCausalLM",
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=(heads,) * 6,
        parameters=4_262_656 + 98_304 * heads,
        weight_bytes=4 * (4_262_656 + 98_304 * heads),
        loss_nats_per_token=loss,
        perplexity=perplexity,
        bits_per_byte=loss / 2.3,
        cache_bytes_per_token_computed=bytes_per_token,
        cache_bytes_per_token_measured=float(bytes_per_token),
        cache_bytes_per_token_beyond_window=bytes_per_token,
        peak_memory_bytes=420_000_000 + 8_000_000 * heads,
    )
    return replace(facts, **changes)


def _report() -> Report:
    return Report(
        format=FORMAT,
        donor=sample_model("examples/donor", 8, 3.1, 22.1980),
        student=sample_model("students/two-heads", 2, 3.18, 24.0468),
        kl_nats_per_token=0.0912,
        top1_agreement_fraction=0.8434,
        differences=Differences(
            loss_nats_per_token=Interval(value=0.08, low=0.071, high=0.0894),
            perplexity_ratio=Interval(value=1.0833, low=1.0736, high=1.0935),
            bits_per_byte=Interval(value=0.0348, low=0.0309, high=0.0389),
            kl_nats_per_token=Interval(value=0.0912, low=0.0874, high=0.0953),
            top1_agreement_fraction=Interval(value=0.8434, low=0.8391, high=0.8476),
        ),
        by_context=_by_context(),
        retrieval=_retrieval(),
        tasks=_tasks(),
        speed=tuple(_speed(batch, context) for batch in (1, 4, 16) for context in (128, 256, 480)),
        capacity=_capacity(),
        continuations=_continuations(),
        text=_text(),
        settings=_settings(),
        conversion=_conversion(),
        recipe=_recipe(),
        command="hf-gqa evaluate students/two-heads --donor examples/donor --text corpora/held-out.txt --output_dir out",
        notes=("Speeds are of this machine and this load.", "The donor was trained on contexts up to 512 tokens."),
    )


def _by_context() -> tuple[ContextLoss, ...]:
    return tuple(
        ContextLoss(
            first_context_tokens=2**number,
            last_context_tokens=2 ** (number + 1) - 1,
            tokens=120 * 2**number,
            donor_loss_nats_per_token=donor,
            student_loss_nats_per_token=student,
            kl_nats_per_token=(student - donor) * 1.1,
            difference=Interval(value=student - donor, low=student - donor - 0.02, high=student - donor + 0.02),
        )
        for number, (donor, student) in enumerate(zip(DONOR_BY_CONTEXT, STUDENT_BY_CONTEXT, strict=True))
    )


def _retrieval() -> tuple[Retrieval, ...]:
    accuracy = {"passkey": ((1.0, 1.0), (1.0, 0.95), (0.95, 0.6)), "key_value": ((0.9, 0.85), (0.7, 0.5), (0.55, 0.2))}
    return tuple(
        Retrieval(
            task=task,
            context_tokens=context,
            samples=20,
            donor_accuracy_fraction=donor,
            student_accuracy_fraction=student,
            donor_answer_loss_nats_per_token=0.1 + (1 - donor),
            student_answer_loss_nats_per_token=0.1 + 1.5 * (1 - student),
            difference=Interval(
                value=1.5 * (1 - student) - (1 - donor), low=(donor - student) / 2, high=1.2 + donor - student
            ),
        )
        for task, pairs in accuracy.items()
        for context, (donor, student) in zip((128, 256, 480), pairs, strict=True)
    )


def _tasks() -> tuple[TaskScore, ...]:
    shared = {"version": "1.0", "num_fewshot": 0, "samples": 500}
    return (
        TaskScore(
            task="lambada_local",
            metric="acc",
            higher_is_better=True,
            donor=0.312,
            donor_stderr=0.0207,
            student=0.286,
            student_stderr=0.0202,
            difference=Interval(value=-0.026, low=-0.05, high=-0.002),
            **shared,
        ),
        TaskScore(
            task="lambada_local",
            metric="perplexity",
            higher_is_better=False,
            donor=58.2,
            donor_stderr=4.1,
            student=71.9,
            student_stderr=5.3,
            difference=None,
            **shared,
        ),
        TaskScore(
            task="piqa_local",
            metric="acc_norm",
            higher_is_better=True,
            donor=0.548,
            donor_stderr=0.0223,
            student=0.552,
            student_stderr=0.0222,
            difference=Interval(value=0.004, low=-0.02, high=0.028),
            **shared,
        ),
    )


def _speed(batch_size: int, context_tokens: int) -> Speed:
    """Decoding that gains more where more cache is read."""
    cache_share = batch_size * context_tokens / (batch_size * context_tokens + 1500)
    speedup, donor = 1 + 1.2 * cache_share, 260 * batch_size / (1 + 3 * cache_share)
    return Speed(
        batch_size=batch_size,
        context_tokens=context_tokens,
        repetitions=5,
        donor_first_token_seconds=0.00021 * batch_size * context_tokens,
        student_first_token_seconds=0.0002 * batch_size * context_tokens,
        first_token_speedup=1.05,
        donor_decode_tokens_per_second=donor,
        student_decode_tokens_per_second=donor * speedup,
        decode_speedup=speedup,
        decode_speedup_low=speedup - 0.07,
        decode_speedup_high=speedup + 0.05,
        allowed_decode_speedup=1 + 2.4 * cache_share,
    )


def _capacity() -> tuple[Capacity, ...]:
    return tuple(
        Capacity(
            memory_bytes=gib * 2**30,
            batch_size=batch,
            donor_context_tokens=(gib * 2**30 - 20_000_000) // (12_288 * batch),
            student_context_tokens=(gib * 2**30 - 18_000_000) // (3_072 * batch),
        )
        for gib in (1, 8)
        for batch in (1, 8)
    )


def _continuations() -> tuple[Continuation, ...]:
    return (
        Continuation(
            prompt="The old lighthouse keeper opened the door and",
            donor=" looked out at the sea. The wind had fallen, and the boats were coming home one by one.",
            converted=" the the of and, the the sea sea. And and the of the and the.",
            student=" looked out at the water. The wind had fallen, and the boats were coming back to the harbour.",
        ),
        Continuation(
            prompt="In the second year of the drought,",
            donor=" the river was so low that the children could walk across it without wetting their knees.",
            student=" the river was so low that the river was a road, and the children walked on it to the school.",
        ),
    )


def _text() -> TextFacts:
    return TextFacts(
        sources=("corpora/held-out.txt",),
        fingerprint="3f5a9c0d17e24b68",
        documents=41,
        tokens=61_320,
        text_bytes=203_466,
        windows=240,
        context_tokens=511,
        stride_tokens=256,
        longest_context_tokens=512,
    )


def _settings() -> Settings:
    return Settings(
        device="cpu",
        device_name="An invented processor",
        dtype="float32",
        batch_size=8,
        attn_implementation="sdpa",
        threads=2,
        seed=0,
        confidence_fraction=0.95,
        resamples=2000,
        versions={"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "hf_gqa": "0.1.0"},
    )


def _conversion() -> dict:
    return {
        "format": 1,
        "plan": {"num_key_value_heads": [2], "method": ["mean_pool"], "sharing": "own"},
        "layer_plan": [{"num_key_value_heads": 2}] * 6,
        "export": "native",
        "reason": "the donor's own class takes the plan",
        "model_class": "LlamaForCausalLM",
        "donor": {"name": "examples/donor", "revision": None, "weights_sha256": {"model.safetensors": "0" * 64}},
        "versions": {"hf_gqa": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "uptraining": {"budget_tokens": 2_000_000, "objective": "distill"},
    }


def _recipe() -> dict:
    return {
        "donor": "examples/donor",
        "convert": {"num_key_value_heads": [2], "method": "mean_pool"},
        "uptrain": {"budget_tokens": 2_000_000, "train_file": ["corpora/train.txt"]},
        "evaluate": {"text": ["corpora/held-out.txt"], "tasks": ["lambada_local", "piqa_local"]},
    }
