"""Floor 4: what a conversion cost and what it bought, measured, with intervals."""

from .evaluation import evaluate
from .recipe import EvaluationRecipe
from .report import Report


__all__ = ["EvaluationRecipe", "Report", "evaluate"]
