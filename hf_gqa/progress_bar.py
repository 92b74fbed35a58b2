"""The one way in which long work shows how far it is."""

from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm


def progress_bar(description: str, total: float | None, unit: str, *, shown: bool = True, **options) -> tqdm:
    """A bar on terminals, unless Hugging Face's own bars are switched off.

    Args:
        shown: False in processes that others speak for.
    """
    hidden = True if are_progress_bars_disabled() or not shown else None  # None: hidden where it is no terminal
    return tqdm(desc=description, total=total, unit=unit, disable=hidden, dynamic_ncols=True, **options)
