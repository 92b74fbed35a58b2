"""Rows of calibration text as windows in which every token after the first is predicted."""

import torch

from ..evaluate.inputs.windows import Window


def rows_as_windows(rows_NL: torch.Tensor) -> list[Window]:
    return [Window(tokens=tuple(row), scored=len(row) - 1) for row in rows_NL.tolist()]
