"""What uptraining 7B to 70B would take, computed and not measured: the tables of docs/scale.md.

Run: `python benchmarks/scale_plan.py`. Pure Python; change the numbers below to yours.
"""

from dataclasses import dataclass


GB = 1e9
GPU_BYTES, PEAK_FLOPS, UTILISATION = 80e9, 989e12, 0.40
GPUS, PROCESSES_PER_HOST = (1, 8, 64), 8
PRETRAINING_TOKENS, FRACTIONS = 2e12, (0.001, 0.01, 0.05)
NUM_KEY_VALUE_HEADS, HEAD_DIM, SEQUENCE_LENGTH, LORA_RANK, CHUNK_TOKENS = 8, 128, 4096, 16, 1024
TOP_KS = (16, 64, 256)
FP32, BF16, INT32, UINT16 = 4, 2, 4, 2


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped donor with one KV head per query head, and its student's heads."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int = 32_000

    @property
    def query_and_output(self) -> int:
        return self.num_hidden_layers * 2 * self.hidden_size * self.num_attention_heads * HEAD_DIM

    @property
    def attention(self) -> int:
        """Trained by attention matching: query, key, value, output projections of the student."""
        return self.query_and_output + self.key_value(NUM_KEY_VALUE_HEADS)

    def key_value(self, heads: int) -> int:
        return self.num_hidden_layers * 2 * self.hidden_size * heads * HEAD_DIM

    @property
    def feed_forward(self) -> int:
        return self.num_hidden_layers * 3 * self.hidden_size * self.intermediate_size

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def student(self) -> int:
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        return self.attention + self.feed_forward + 2 * self.embedding + norms

    @property
    def donor(self) -> int:
        return self.student + self.key_value(self.num_attention_heads) - self.key_value(NUM_KEY_VALUE_HEADS)

    @property
    def donor_attention(self) -> int:
        return self.query_and_output + self.key_value(self.num_attention_heads)

    @property
    def lora(self) -> int:
        """Adapters on query and output projections."""
        return self.num_hidden_layers * 2 * LORA_RANK * (self.hidden_size + self.num_attention_heads * HEAD_DIM)


SHAPES = (
    Shape("7B", 32, 4096, 11008, 32),
    Shape("13B", 40, 5120, 13824, 40),
    Shape("34B", 48, 8192, 22016, 64),
    Shape("70B", 80, 8192, 28672, 64),
)


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def gb(size_bytes: float) -> str:
    return f"{size_bytes / GB:,.1f}" if size_bytes < 100 * GB else f"{size_bytes / GB:,.0f}"


def billions(number: float) -> str:
    return f"{number / 1e9:.2f}"


def parameters() -> str:
    heads = ["", "layers", "hidden", "feed-forward", "heads", "donor", "student", "attention", "LoRA + key, value"]
    rows = []
    for s in SHAPES:
        sizes = [s.donor, s.student, s.attention, s.lora + s.key_value(NUM_KEY_VALUE_HEADS)]
        shape = [s.num_hidden_layers, s.hidden_size, s.intermediate_size]
        kv = f"{s.num_attention_heads} to {NUM_KEY_VALUE_HEADS}"
        rows.append([s.name, *map(str, shape), kv, *map(billions, sizes)])
    return table("Parameters, billions", heads, rows)


def state_bytes(s: Shape) -> dict[str, tuple[float, float]]:
    """Way to train: bytes that FSDP shards, and bytes of the teacher, which it does not."""
    attention, key_value = s.attention, s.key_value(NUM_KEY_VALUE_HEADS)
    lora = s.lora + key_value
    frozen = s.donor - s.donor_attention
    return {
        "fp32, all, no teacher": (s.student * 4 * FP32, 0),
        "fp32, all, stored logits": (s.student * 4 * FP32, 0),
        "fp32, all, second model": (s.student * 4 * FP32, s.donor * FP32),
        "bf16, all, second model": (s.student * 4 * BF16, s.donor * BF16),
        "fp32, attention, zero-copy": (s.student * FP32 + attention * 3 * FP32, s.donor_attention * FP32),
        "bf16, attention, zero-copy": (s.student * BF16 + attention * 3 * BF16, s.donor_attention * BF16),
        "bf16, LoRA, zero-copy": (s.student * BF16 + lora * 3 * BF16, (s.donor - frozen) * BF16),
    }


def under_fsdp(s: Shape, way: str, sharded: float, teacher: float, gpus: int) -> float:
    """Bytes per GPU: the shard; embedding, head and one layer gathered, with gradients; a whole teacher of its own."""
    width = FP32 if way.startswith("fp32") else BF16
    layer = (s.student - 2 * s.embedding) / s.num_hidden_layers
    whole_teacher = s.donor * width if teacher else 0
    return sharded / gpus + 2 * (layer + 2 * s.embedding) * width + whole_teacher


def memory_alone() -> str:
    rows = [[way, *(gb(sum(state_bytes(s)[way])) for s in SHAPES)] for way in state_bytes(SHAPES[0])]
    return table(
        "Weights, gradients, AdamW and teacher in GB, on each GPU, unsharded (one GPU, or DDP)", heads_of(), rows
    )


def heads_of(first: str = "") -> list[str]:
    return [first, *(s.name for s in SHAPES)]


def memory_sharded() -> str:
    rows = []
    for way in (way for way in state_bytes(SHAPES[0]) if "LoRA" not in way):  # which cannot be sharded
        for gpus in GPUS[1:]:
            sizes = [under_fsdp(s, way, *state_bytes(s)[way], gpus) for s in SHAPES]
            cells = [f"{gb(size)}{'' if size < GPU_BYTES else ' (no)'}" for size in sizes]
            rows.append(
                [way.replace("zero-copy", "whole teacher").replace("second model", "whole teacher"), str(gpus), *cells]
            )
    return table(
        "The same per GPU under FSDP2, without activations; (no): above 80 GB", ["", "GPUs", *heads_of()[1:]], rows
    )


def host_memory() -> str:
    rows = []
    for way in state_bytes(SHAPES[0]):
        width = FP32 if way.startswith("fp32") else BF16
        sizes = [PROCESSES_PER_HOST * (s.student * width + state_bytes(s)[way][1]) for s in SHAPES]
        rows.append([way, *map(gb, sizes)])
    return table(
        f"Host memory while {PROCESSES_PER_HOST} processes of a machine load, before FSDP2 shards, GB", heads_of(), rows
    )


def activation_bytes(s: Shape, checkpointing: bool) -> float:
    """Of one row, in bf16, with an attention kernel that keeps no scores; logits once and fp32 chunks of them."""
    query, key_value = s.num_attention_heads * HEAD_DIM, NUM_KEY_VALUE_HEADS * HEAD_DIM
    per_layer = 6 * s.hidden_size + 3 * query + 2 * key_value + 4 * s.intermediate_size
    kept = s.num_hidden_layers * s.hidden_size + per_layer if checkpointing else s.num_hidden_layers * per_layer
    logits = SEQUENCE_LENGTH * s.vocab_size * BF16 + 6 * CHUNK_TOKENS * s.vocab_size * FP32
    return SEQUENCE_LENGTH * kept * BF16 + logits


def activations() -> str:
    rows = [
        [name, *(gb(activation_bytes(s, checkpointing)) for s in SHAPES)]
        for name, checkpointing in (("kept", False), ("gradient checkpointing", True))
    ]
    return table(f"Activations and logits of one row of {SEQUENCE_LENGTH:,} tokens, GB", heads_of(), rows)


def stored_logits() -> str:
    heads = ["top_k", "bytes per token, vocabulary to 65,536", "larger vocabulary"]
    rows = []
    for top_k in TOP_KS:
        cells = []
        for index in (UINT16, INT32):
            per_token = top_k * (index + BF16)
            terabytes = ", ".join(f"{per_token * PRETRAINING_TOKENS * f / 1e12:,.1f}" for f in FRACTIONS)
            cells.append(f"{per_token:,} ({terabytes} TB)")
        rows.append([str(top_k), *cells])
    shares = ", ".join(f"{fraction:.1%}" for fraction in FRACTIONS)
    return table(f"Stored logits on disk; in brackets for {shares} of 2T tokens", heads, rows)


def flops_per_token(s: Shape) -> dict[str, float]:
    """2 per parameter and pass, twice that backward (activations, weights); `scores` is attention's own, causal."""
    donor, student = s.donor - s.embedding, s.student - s.embedding
    donor_body, student_body = donor - s.embedding, student - s.embedding  # without the head
    scores = 2 * SEQUENCE_LENGTH * s.num_attention_heads * HEAD_DIM * s.num_hidden_layers
    teacher, forward, backward = 2 * donor + scores, 2 * student + scores, 4 * student + 2 * scores
    through_output = 2 * s.query_and_output / 2  # the teacher's inputs need no gradient, the scores do
    return {
        "all, no teacher (6N)": forward + backward,
        "all, stored logits (6N)": forward + backward,
        "all, KL to a teacher (8N)": forward + backward + teacher,
        "attention, KL to a teacher": forward + 2 * student + 2 * scores + 2 * s.attention + teacher,
        "attention matching": 2 * donor_body + scores + 4 * s.attention + through_output + 3 * scores,
        "attention matching, DDP": 2 * (donor_body + student_body + s.attention) + through_output + 4 * scores,
        "attention matching, FSDP2": 2 * donor_body + 4 * student_body + 2 * s.attention + 4 * scores,
        "more with checkpointing": forward,
    }


def compute() -> str:
    rows = [[way, *(f"{flops_per_token(s)[way] / 1e9:,.1f}" for s in SHAPES)] for way in flops_per_token(SHAPES[0])]
    return table(f"GFLOP per token at {SEQUENCE_LENGTH:,} tokens per row", heads_of(), rows)


def tokens_per_second(s: Shape, way: str) -> float:
    return PEAK_FLOPS * UTILISATION / flops_per_token(s)[way]


def speed() -> str:
    ways = [way for way in flops_per_token(SHAPES[0]) if not way.startswith("more")]
    rows = [[way, *(f"{tokens_per_second(s, way):,.0f}" for s in SHAPES)] for way in ways]
    return table(
        f"Tokens per second of one GPU at {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s", heads_of(), rows
    )


def hours() -> str:
    rows = []
    for way in (
        "all, KL to a teacher (8N)",
        "all, stored logits (6N)",
        "attention matching",
        "attention matching, FSDP2",
    ):
        for fraction in FRACTIONS:
            tokens = fraction * PRETRAINING_TOKENS
            cells = [f"{tokens / tokens_per_second(s, way) / 3600 / GPUS[-1]:,.0f}" for s in SHAPES]
            rows.append([way, f"{fraction:.1%}", f"{tokens / 1e9:,.0f}", *cells])
    heads = ["", "of 2T tokens", "billions", *heads_of()[1:]]
    return table(f"Hours on {GPUS[-1]} GPUs, if they scale perfectly; on 8 it is 8 times that", heads, rows)


def tables() -> str:
    made = (parameters, memory_alone, memory_sharded, host_memory, activations, stored_logits, compute, speed, hours)
    return "\n".join(part() for part in made)


if __name__ == "__main__":
    print(tables(), end="")
