"""The table of a sweep: what each plan saves and what it costs, as JSON, CSV, and which plans no other beats."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..convert.donor import Donor
from ..convert.manifest import donor_identity
from ..convert.plan import ConversionPlan
from ..evaluate.report import Interval, ModelFacts, Report, Speed
from ..evaluate.report.from_json import value_of
from ..reading import read_json
from ..refusal import Refusal


FORMAT = 2
SWEEP_FILE, TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.csv", "sweep.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One plan: what it saves and what it costs.

    Args:
        plan: name of its folder.
        uptrain_tokens: 0 where the student was not uptrained.
        loss_difference: student's loss less the donor's, with its interval; None for too little text.
        loss_nats_per_token: as the report has it, so of an encoder-decoder's targets or of masked tokens too.
        cache_bytes_per_token: of an encoder-decoder those of a token it reads and of one it writes; None for encoders.
        cache_fraction: student's cache bytes per token over the donor's.
        decode_tokens_per_second, decode_speedup, allowed_decode_speedup: at the largest batch and context timed; None
            where nothing was.
        on_front: no other plan has both a smaller cache (of encoders, fewer parameters) and a lower loss.
    """

    plan: str
    num_key_value_heads: int
    method: str
    sharing: str
    uptrain_tokens: int
    loss_nats_per_token: float
    loss_difference: Interval | None
    perplexity: float
    kl_nats_per_token: float
    top1_agreement_fraction: float
    cache_bytes_per_token: int | None
    cache_fraction: float | None
    parameters: int
    decode_tokens_per_second: float | None
    decode_speedup: float | None
    allowed_decode_speedup: float | None
    on_front: bool = False

    @property
    def size(self) -> int:
        """What conversion makes smaller: the cache, or the parameters of what keeps none."""
        return self.parameters if self.cache_bytes_per_token is None else self.cache_bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """All rows, and the donor's side of them; `sweep.json` holds it.

    Args:
        donor_identity: SHA-256 over what tells the donor's weights from others.
    """

    format: int
    donor: str
    donor_identity: str
    donor_loss_nats_per_token: float
    donor_perplexity: float
    donor_cache_bytes_per_token: int | None
    donor_parameters: int
    donor_decode_tokens_per_second: float | None
    text_tokens: int
    context_tokens: int
    dtype: str
    device: str
    rows: tuple[SweepRow, ...]

    @classmethod
    def read(cls, path: str | Path) -> "SweepTable":
        """Of a `sweep.json`, or of a folder that holds one."""
        path = Path(path).expanduser()
        path = path / SWEEP_FILE if path.is_dir() else path
        values = read_json(path, "Make a sweep with hf-gqa sweep.")
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise Refusal(f"{path}: is no sweep of format {FORMAT}. Make one with this hf-gqa sweep.")
        return value_of(cls, values, str(path))


def donor_hash(donor: Donor) -> str:
    return hashlib.sha256(json.dumps(donor_identity(donor), sort_keys=True).encode()).hexdigest()


def largest(report: Report) -> Speed:
    """The timing with the most cache to read."""
    return max(report.speed, key=lambda speed: speed.batch_size * speed.context_tokens)


def cache_bytes_of(model: ModelFacts) -> int | None:
    """Of a token; an encoder-decoder keeps a part for what it reads and a part for what it writes."""
    own = model.cache_bytes_per_token_computed
    return None if own is None else own + (model.cache_bytes_per_source_token_computed or 0)


def row_of(name: str, plan: ConversionPlan, report: Report) -> SweepRow:
    uptraining = (report.conversion or {}).get("uptraining") or {}
    speed = largest(report) if report.speed else None
    cache, before = cache_bytes_of(report.student), cache_bytes_of(report.donor)
    return SweepRow(
        plan=name,
        num_key_value_heads=plan.num_key_value_heads,
        method=",".join(plan.method),
        sharing=plan.sharing,
        uptrain_tokens=uptraining.get("tokens_seen", 0),
        loss_nats_per_token=report.student.loss_nats_per_token,
        loss_difference=report.differences.loss_nats_per_token,
        perplexity=report.student.perplexity,
        kl_nats_per_token=report.kl_nats_per_token,
        top1_agreement_fraction=report.top1_agreement_fraction,
        cache_bytes_per_token=cache,
        cache_fraction=cache / before if before else None,
        parameters=report.student.parameters,
        decode_tokens_per_second=speed.student_decode_tokens_per_second if speed else None,
        decode_speedup=speed.decode_speedup if speed else None,
        allowed_decode_speedup=speed.allowed_decode_speedup if speed else None,
    )


def with_front(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """Rows marked that no other beats: none has at most their size and at most their loss, and less of one."""

    def beaten(row: SweepRow) -> bool:
        mine = (row.size, row.loss_nats_per_token)
        others = [(other.size, other.loss_nats_per_token) for other in rows]
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others)

    return tuple(replace(row, on_front=not beaten(row)) for row in rows)


def as_csv(table: SweepTable) -> str:
    """One line per plan; an interval is two columns."""
    lines = []
    for row in table.rows:
        values = asdict(row)
        interval = values.pop("loss_difference") or {}
        names = {f"loss_difference_{end}": interval.get(end) for end in ("value", "low", "high")}
        lines.append(values | names)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
