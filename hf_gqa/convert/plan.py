"""What the user asks for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from ..methods import HEAD_COUNT_KINDS, METHODS, method_kind
from ..refusal import Refusal
from ..runtime.layer_plan import LayerPlan
from ..sharing import SHARINGS


EXPORTS = ("auto", "native", "bundle")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """What the student shall be; checked when made, exact round trip through JSON.

    Args:
        num_key_value_heads: KV heads of every layer, or of each, from the first.
        method: names of conversion methods, applied in order; a string may hold several, separated by commas.
        sharing: name of the pattern by which layers share.
        export: "native" for the donor's own class, "bundle" for self-contained code, "auto" for native if it can be.
        seed: of the methods that draw random numbers.

    Raises:
        Refusal: an unknown name, or a value out of range.
    """

    num_key_value_heads: int | tuple[int, ...]
    method: tuple[str, ...] = ("mean_pool",)
    sharing: str = "own"
    export: str = "auto"
    seed: int = 0

    def __post_init__(self):
        method = self.method.split(",") if isinstance(self.method, str) else self.method
        if not isinstance(method, list | tuple) or not all(isinstance(name, str) for name in method):
            raise Refusal(
                f"method = {method!r} is not a list of names. Use one or more of {', '.join(METHODS.names())}."
            )
        method = tuple(name.strip().replace("-", "_") for name in method)
        object.__setattr__(self, "method", method)
        self._check_heads()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise Refusal(f"seed = {self.seed!r} is not a whole number from 0. Use 0 or more.")
        if self.export not in EXPORTS:
            raise Refusal(f"export = {self.export!r} is unknown. Use one of {', '.join(EXPORTS)}.")
        SHARINGS.get(self.sharing)
        changing = [name for name in method if method_kind(name) in HEAD_COUNT_KINDS]
        if len(changing) != 1:
            raise Refusal(
                f"method = {','.join(method)}: {len(changing)} of these change the number of KV heads. Use exactly one "
                f"of {', '.join(name for name in METHODS.names() if method_kind(name) in HEAD_COUNT_KINDS)}."
            )
        _check_order(method, changing[0])

    def _check_heads(self) -> None:
        heads = self.num_key_value_heads
        if isinstance(heads, list):
            object.__setattr__(self, "num_key_value_heads", tuple(heads))
        for each in heads if isinstance(heads, list | tuple) and heads else [heads]:
            if not isinstance(each, int) or isinstance(each, bool) or each < 1:
                raise Refusal(f"num_key_value_heads = {each!r} is not a positive whole number. Use 1 or more.")
        if isinstance(heads, list | tuple) and self.sharing != "own":
            raise Refusal(
                f"num_key_value_heads = {list(heads)}: a number for each layer goes with sharing = own, not with "
                f"{self.sharing}. Give one number for all layers."
            )

    @property
    def head_count_method(self) -> str:
        """The one method that changes the number of KV heads."""
        return next(name for name in self.method if method_kind(name) in HEAD_COUNT_KINDS)

    def heads_of_layers(self, num_hidden_layers: int) -> list[int]:
        """Raises Refusal unless there is one number, or one for each layer."""
        heads = self.num_key_value_heads
        if isinstance(heads, int):
            return [heads] * num_hidden_layers
        if len(heads) != num_hidden_layers:
            raise Refusal(
                f"num_key_value_heads = {_listed(heads)}: {len(heads)} numbers for num_hidden_layers = "
                f"{num_hidden_layers}. Give one for all layers, or one for each."
            )
        return list(heads)

    def rows(self, num_hidden_layers: int) -> tuple[LayerPlan, ...]:
        heads = self.heads_of_layers(num_hidden_layers)
        rows = SHARINGS.get(self.sharing)(num_hidden_layers, max(heads))
        if isinstance(self.num_key_value_heads, int):
            return rows
        return tuple(replace(row, num_key_value_heads=n) for row, n in zip(rows, heads, strict=True))

    def to_dict(self) -> dict:
        heads = self.num_key_value_heads
        heads = heads if isinstance(heads, int) else list(heads)
        return asdict(self) | {"method": list(self.method), "num_key_value_heads": heads}

    @classmethod
    def from_dict(cls, values: dict) -> "ConversionPlan":
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise Refusal(f"plan: got {values!r}, expected an object with keys of {', '.join(known)}.")
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise Refusal(f"plan: unknown key '{unknown[0]}'. Known: {', '.join(known)}.")
        if "num_key_value_heads" not in values:
            raise Refusal(
                "plan: the key 'num_key_value_heads' is missing. Say how many KV heads each layer shall have."
            )
        return cls(**values)


def _check_order(method: tuple[str, ...], changing: str) -> None:
    """Rearranging prepares a merge, a repair follows one."""
    place = method.index(changing)
    for number, name in enumerate(method):
        kind = method_kind(name)
        if kind == "repair" and method_kind(changing) != "reduce":
            raise Refusal(
                f"method = {','.join(method)}: '{name}' repairs what a reduction lost, and '{changing}' loses nothing. "
                f"Leave it out."
            )
        if (kind == "rearrange" and number > place) or (kind == "repair" and number < place):
            side = "before" if kind == "rearrange" else "after"
            raise Refusal(f"method = {','.join(method)}: '{name}' belongs {side} '{changing}'. Put it there.")


def make_plan(plan: ConversionPlan | None, plan_fields: dict) -> ConversionPlan:
    """The plan that a caller gave whole or by its fields."""
    if plan is None:
        return ConversionPlan.from_dict(plan_fields)
    if plan_fields:
        raise Refusal(f"plan: got a plan and also {', '.join(sorted(plan_fields))}. Give either, not both.")
    return plan


def legal_targets(num_attention_heads: int, num_key_value_heads: int) -> tuple[list[int], list[int]]:
    """KV head counts that a donor can be reduced to, and those it can be expanded to."""
    fewer = [n for n in range(1, num_key_value_heads + 1) if num_key_value_heads % n == 0]
    more = [
        n
        for n in range(num_key_value_heads + 1, num_attention_heads + 1)
        if n % num_key_value_heads == 0 and num_attention_heads % n == 0
    ]
    return fewer, more


def check_plan(
    plan: ConversionPlan, num_attention_heads: int, num_key_value_heads: int, where: str, wanted: int | None = None
) -> None:
    """Refuse a plan that a layer of this donor, which shall have `wanted` KV heads, cannot follow."""
    fewer, more = legal_targets(num_attention_heads, num_key_value_heads)
    wanted = plan.num_key_value_heads if wanted is None else wanted
    if wanted == num_key_value_heads:
        return
    if method_kind(plan.head_count_method) == "expand":
        if wanted not in more:
            raise Refusal(
                f"num_key_value_heads = {wanted}: 'expand' repeats the {num_key_value_heads} KV heads of donor '{where}' "
                f"({num_attention_heads} query heads). Use one of {_listed(more) or 'none: it has all of them'}."
            )
    elif wanted > num_key_value_heads:
        raise Refusal(
            f"num_key_value_heads = {wanted} is more than the {num_key_value_heads} KV heads of donor '{where}'. "
            f"Use one of {_listed(fewer)}" + (f", or --method expand with {_listed(more)}." if more else ".")
        )
    elif wanted not in fewer:
        of = "num_attention_heads" if num_key_value_heads == num_attention_heads else "the donor's num_key_value_heads"
        raise Refusal(
            f"num_key_value_heads = {wanted} does not divide {of} = {num_key_value_heads} (donor '{where}'). "
            f"Use one of {_listed(fewer)}."
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
