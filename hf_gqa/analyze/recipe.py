"""What an analysis shall look at and choose for: the options of `hf-gqa analyze`, checked, as one value."""

from dataclasses import dataclass

from ..recipe import Recipe
from ..refusal import Refusal
from .borrowing import BORROWED


DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOOSERS = ("kl", "similarity")
BUDGETS = ("cache_bytes_per_token", "parameters", "shared_layers")
POSITIVE = (*BUDGETS, "tokens", "samples", "reach", "batch_size", "num_key_value_heads", "candidates")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisRecipe(Recipe):
    """Checked when made; exact round trip through YAML, unknown keys refused.

    Args:
        text: files (.txt, .jsonl, .json, .parquet) and folders of them.
        text_column: as in `TextSource`.
        sharing: the pattern by which layers shall share.
        cache_bytes_per_token, parameters: the budget: the most that the student may have; or
        shared_layers: how many layers shall borrow, which is what makes it faster. Without any of the three no plan is made.
        num_key_value_heads: KV heads of every layer of the student; None: as many as the donor has. What borrowing costs is
            measured with the donor's own in any case.
        choose_by: what the plan goes by: "kl", what borrowing costs untrained, or "similarity" of attention, as in EchoAtt.
        candidates: chosen by KL: of the sharings with the smallest sums of costs, how many are measured whole before one is the plan.
        tokens: to measure costs on, and as many more to check choices on.
        samples: of the rows to choose by, over which the similarity of attention is averaged; at most all of them.
        sample_tokens: of a sample, and of the rows of all text; None: 512, or the longest that the donor takes.
        reach: a layer may borrow from one that is at most so many layers before it; None: from any before it.
        block_layers: of which the paper's choice shares all but the first.
        dtype: to compute in; "auto": the donor's.
        device: such as "cuda:1"; None: the accelerator, if there is one.
        batch_size: rows at once; None: as many as make some 4096 tokens.

    Raises:
        Refusal: contradictory or unknown values.
    """

    text: tuple[str, ...]
    text_column: str | None = None
    sharing: str = "echo"
    cache_bytes_per_token: int | None = None
    parameters: int | None = None
    shared_layers: int | None = None
    num_key_value_heads: int | None = None
    choose_by: str = "kl"
    candidates: int = 8
    tokens: int = 16_384
    samples: int = 32
    sample_tokens: int | None = None
    reach: int | None = None
    block_layers: int = 2
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | None = None

    def __post_init__(self):
        self.check_fields()
        if not self.text:
            raise Refusal("text: got none. Give --text with files or folders.")
        if self.sharing not in BORROWED:
            raise Refusal(f"sharing = {self.sharing!r} is not one that is analyzed. Use one of {', '.join(BORROWED)}.")
        if len(self.budgets) > 1:
            raise Refusal(f"budget: got {' and '.join(self.budgets)}. Give one of {', '.join(BUDGETS)}.")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"{name} = {value} is not a positive whole number. Use 1 or more.")
        for name in ("sample_tokens", "block_layers"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise Refusal(f"{name} = {value}: is too small. Use 2 or more.")
        if self.choose_by not in CHOOSERS:
            raise Refusal(f"choose_by = {self.choose_by!r} is unknown. Use one of {', '.join(CHOOSERS)}.")
        if self.choose_by == "similarity" and self.reach is not None:
            raise Refusal(
                f"reach = {self.reach}: the order of similarity knows no reach. Leave it out, or choose by kl."
            )
        if self.dtype not in DTYPES:
            raise Refusal(f"dtype = {self.dtype!r} is unknown. Use one of {', '.join(DTYPES)}.")

    @property
    def budgets(self) -> list[str]:
        """Those given, at most one."""
        return [name for name in BUDGETS if getattr(self, name) is not None]
