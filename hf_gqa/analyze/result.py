"""What an analysis found, as one value that is JSON."""

import json
from dataclasses import asdict, dataclass


FORMAT = "hf_gqa analysis 1"
RESULT_FILE, HEATMAP_FILE, PLAN_FILE = "analysis.json", "heatmap.svg", "plan.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCost:
    """KL to the donor, in nats per token, when one layer alone borrows; None as interval: too few rows to say."""

    borrower: int
    owner: int
    kl: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Layers that one chooser would have borrow.

    Args:
        chooser: "kl", the smallest sum of pair costs; "greedy", layer by layer; "echoatt", the most alike to all others;
            "echoatt_blocks", the paper's own choice; "plan", the best of those that
            cost least by sum and meet the budget, measured whole.
        owners: (borrower, owner).
        summed_kl: the sum of pair costs, which the first two go by; None where a pair was not measured.
        kl, loss, top1_agreement: measured together, on text that was not chosen by.
    """

    chooser: str
    owners: tuple[tuple[int, int], ...]
    summed_kl: float | None
    kl: float
    loss: float
    top1_agreement: float
    cache_bytes_per_token: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisResult:
    """Args:
    kinds: of each layer; only layers of one kind share.
    text_sha256: of the rows of tokens.
    similarity: cosine of attention matrices between every two layers.
    kept: layers at both ends that EchoAtt leaves untouched.
    choices: by number of borrowers, each chooser's; the paper's own last.
    plan: that `convert` takes; None without a budget.
    notes: what was left out.
    """

    format: str
    donor: str
    donor_fingerprint: str
    sharing: str
    recipe: dict
    text_sha256: str
    tokens_to_choose: int
    tokens_to_check: int
    samples: int
    sample_tokens: int
    kinds: tuple[str, ...]
    similarity: tuple[tuple[float, ...], ...]
    mean_similarity: tuple[float, ...]
    kept: tuple[int, ...]
    pairs: tuple[PairCost, ...]
    donor_loss: float
    donor_cache_bytes_per_token: int
    donor_parameters: int
    choices: tuple[Chosen, ...]
    plan: dict | None
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        return json.loads(self.to_json())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
