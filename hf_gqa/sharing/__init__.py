"""Floor 2: sharing patterns, one file each, pure integers; the file's name is the pattern's name.

A pattern file defines `rows(num_hidden_layers, num_key_value_heads) -> tuple[LayerPlan, ...]`.
"""

from ..registry import Registry


SHARINGS = Registry(__name__, "sharing pattern", "rows")
