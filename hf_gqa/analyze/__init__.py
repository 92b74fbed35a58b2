"""Floor 5: which layers can share: how alike their attention is, what borrowing costs, and the sharing that costs least."""

from .analysis import Analysis
from .recipe import AnalysisRecipe
from .result import AnalysisResult


__all__ = ["Analysis", "AnalysisRecipe", "AnalysisResult"]
