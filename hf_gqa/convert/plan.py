"""What the user asks for."""

from dataclasses import asdict, dataclass, fields

from ..methods import HEAD_COUNT_KINDS, METHODS, method_kind
from ..refusal import Refusal
from ..runtime.layer_plan import LayerPlan
from ..sharing import SHARINGS, every, nearest_owners


EXPORTS = ("auto", "native", "bundle")
SHARED_INITS = ("own", "mean", "fit")
# Left out of the JSON where they say nothing.
SELDOM_SAID = ("shared_layers", "share_every", "shared_init", "layer_plan", "convert_encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """What the student shall be; checked when made, exact round trip through JSON.

    Args:
        num_key_value_heads: KV heads of every layer; None, where layers share, for as many as the donor has.
        method: names of conversion methods, applied in order; a string may hold several, separated by commas.
        sharing: name of the pattern by which layers share.
        shared_layers: the layers that borrow, each from the nearest earlier layer of its type that does not.
        share_every: in place of them: of so many consecutive layers of a type, all but the first borrow.
        shared_init: what is lent, and to whom: "own", what the lender's weights are in the donor; "mean", over the lender and
            all that borrow from it; "fit", the lender's own again, to which borrowers are fitted on calibration text: which
            of their heads reads which of the lender's, with what queries, and their output projections.
        layer_plan: in place of all these, the rows of the table, for what no pattern says.
        export: "native" for the donor's own class, "bundle" for self-contained code, "auto" for native if it can be.
        seed: of the methods that draw random numbers.
        convert_encoder: whether the encoder of an encoder-decoder is converted too; it caches no keys and values.

    Raises:
        Refusal: an unknown name, or a value out of range.
    """

    num_key_value_heads: int | None = None
    method: tuple[str, ...] = ("mean_pool",)
    sharing: str = "own"
    shared_layers: tuple[int, ...] | None = None
    share_every: int | None = None
    shared_init: str = "own"
    layer_plan: tuple[dict, ...] | None = None
    export: str = "auto"
    seed: int = 0
    convert_encoder: bool = False

    def __post_init__(self):
        method = self.method.split(",") if isinstance(self.method, str) else self.method
        if not isinstance(method, list | tuple) or not all(isinstance(name, str) for name in method):
            raise Refusal(
                f"method = {method!r} is not a list of names. Use one or more of {', '.join(METHODS.names())}."
            )
        method = tuple(name.strip().replace("-", "_") for name in method)
        if "auto" in method:
            raise Refusal(
                "method = auto: is a search for methods, which needs text. Use hf-gqa convert --method auto, or search_plan in "
                "Python, and give the plan that it finds."
            )
        object.__setattr__(self, "method", method)
        heads = self.num_key_value_heads
        may_be_none = self.sharing != "own" or self.layer_plan is not None
        is_count = isinstance(heads, int) and not isinstance(heads, bool) and heads >= 1
        if not is_count and not (heads is None and may_be_none):
            raise Refusal(f"num_key_value_heads = {heads!r} is not a positive whole number. Use 1 or more.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise Refusal(f"seed = {self.seed!r} is not a whole number from 0. Use 0 or more.")
        if not isinstance(self.convert_encoder, bool):
            raise Refusal(f"convert_encoder = {self.convert_encoder!r} is not true or false. Use one of these.")
        if self.export not in EXPORTS:
            raise Refusal(f"export = {self.export!r} is unknown. Use one of {', '.join(EXPORTS)}.")
        self._check_sharing()
        changing = [name for name in method if method_kind(name) in HEAD_COUNT_KINDS]
        if len(changing) != 1:
            raise Refusal(
                f"method = {','.join(method)}: {len(changing)} of these change the number of KV heads. Use exactly one "
                f"of {', '.join(name for name in METHODS.names() if method_kind(name) in HEAD_COUNT_KINDS)}."
            )
        _check_order(method, changing[0])

    @property
    def head_count_method(self) -> str:
        """The one method that changes the number of KV heads."""
        return next(name for name in self.method if method_kind(name) in HEAD_COUNT_KINDS)

    def _check_sharing(self) -> None:
        SHARINGS.get(self.sharing)
        for name in ("shared_layers", "layer_plan"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.shared_init not in SHARED_INITS:
            raise Refusal(f"shared_init = {self.shared_init!r} is unknown. Use one of {', '.join(SHARED_INITS)}.")
        said = [name for name in ("shared_layers", "share_every") if getattr(self, name) is not None]
        if self.layer_plan is not None:
            said += ["num_key_value_heads"] if self.num_key_value_heads is not None else []
            said += ["sharing"] if self.sharing != "own" else []
            if said:
                raise Refusal(f"layer_plan: its rows say all that {', '.join(said)} would. Give either.")
            _parsed_rows(self.layer_plan)
        elif self.sharing == "own" and said:
            patterns = ", ".join(name for name in SHARINGS.names() if name != "own")
            raise Refusal(f"{said[0]}: sharing = own shares nothing. Use sharing = one of {patterns}.")
        elif self.sharing != "own" and len(said) != 1:
            raise Refusal(
                f"sharing = {self.sharing}: {' and '.join(said) or 'nothing'} says which layers borrow. Give one of "
                f"shared_layers (such as 2,3) and share_every (such as 2)."
            )
        self._check_layers()

    def _check_layers(self) -> None:
        shared, factor = self.shared_layers, self.share_every
        whole = isinstance(shared, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in shared)
        if shared is not None and not (whole and shared):
            raise Refusal(f"shared_layers = {shared!r} is no list of layers. Give their numbers, such as 2,3.")
        if factor is not None and (not isinstance(factor, int) or isinstance(factor, bool) or factor < 2):
            raise Refusal(f"share_every = {factor!r} is not a whole number from 2. Use 2 or more.")

    def rows(self, num_key_value_heads: list[int], layer_types: list[str]) -> tuple[LayerPlan, ...]:
        """The table, for a donor of these KV heads and attention types in each layer.

        Raises:
            Refusal: layers that are not there, or with nothing to borrow from.
        """
        if self.layer_plan is not None:
            return _parsed_rows(self.layer_plan)
        wanted = tuple(
            heads if self.num_key_value_heads is None else self.num_key_value_heads for heads in num_key_value_heads
        )
        types = layer_types if getattr(SHARINGS.module(self.sharing), "OF_ONE_TYPE", False) else ["layer"] * len(wanted)
        shared = self.shared_layers if self.share_every is None else every(self.share_every, types)
        return SHARINGS.get(self.sharing)(nearest_owners(shared or (), types), wanted)

    def to_dict(self) -> dict:
        values = asdict(self) | {"method": list(self.method)}
        defaults = {field.name: field.default for field in fields(self)}
        said = {name: value for name, value in values.items() if name not in SELDOM_SAID or value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}

    @classmethod
    def from_dict(cls, values: dict) -> "ConversionPlan":
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise Refusal(f"plan: got {values!r}, expected an object with keys of {', '.join(known)}.")
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise Refusal(f"plan: unknown key '{unknown[0]}'. Known: {', '.join(known)}.")
        if not {"num_key_value_heads", "sharing", "layer_plan"} & values.keys():
            raise Refusal(
                "plan: the key 'num_key_value_heads' is missing. Say how many KV heads each layer shall have."
            )
        return cls(**values)


def _parsed_rows(rows: tuple[dict, ...]) -> tuple[LayerPlan, ...]:
    try:
        return tuple(LayerPlan.from_dict(row) for row in rows)
    except ValueError as error:
        raise Refusal(str(error)) from None


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
    """Refuse a plan that this donor's heads cannot follow.

    Args:
        wanted: KV heads that the plan wants of these; by default those it wants of every layer.
    """
    fewer, more = legal_targets(num_attention_heads, num_key_value_heads)
    wanted = wanted or plan.num_key_value_heads or num_key_value_heads
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


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
