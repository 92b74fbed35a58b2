"""Rows of a sweep, made up."""

from hf_gqa.evaluate.report import Interval
from hf_gqa.workflow.sweep_table import SweepRow


def row(heads: int, over: float, **changes) -> SweepRow:
    values = dict.fromkeys(SweepRow.__dataclass_fields__, 0)
    values |= {"plan": f"mean_pool-own-{heads}", "method": "mean_pool", "sharing": "own", "num_key_value_heads": heads}
    values |= {"loss_nats_per_token": 3 + over, "loss_difference": Interval(value=over, low=over - 1, high=over + 1)}
    return SweepRow(**values | changes)
