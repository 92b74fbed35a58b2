"""Next-token prediction on the text, as in the GQA paper's uptraining. Source: arXiv 2305.13245, section 2.1."""

from ..phases import Objective, Phase


PHASES = (Phase(objective=Objective(cross_entropy=1.0), schedule="linear"),)
