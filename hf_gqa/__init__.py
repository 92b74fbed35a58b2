"""Turn a pretrained multi-head checkpoint into a grouped-query one that is cheaper to serve.

Importing this package registers its own model types with `AutoConfig` and `AutoModel*`, and the attention function
`grouped_sdpa`; it replaces nothing.
"""

from .convert.donor import open_donor
from .convert.families import register_families
from .convert.grouped_attention import use_grouped_attention
from .convert.in_memory import convert
from .convert.plan import ConversionPlan
from .export.refresh import refresh
from .export.verify import verify
from .export.write_student import convert_checkpoint
from .refusal import Refusal
from .runtime.grouped_attention import register_grouped_attention
from .runtime.native_call import VERSION


__version__ = VERSION
__all__ = [
    "ConversionPlan",
    "Refusal",
    "convert",
    "convert_checkpoint",
    "open_donor",
    "refresh",
    "use_grouped_attention",
    "verify",
]

register_families()
register_grouped_attention()
