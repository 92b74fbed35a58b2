"""The teacher's whole next-token distribution. Source: Minitron (arXiv 2407.14679): forward KL, temperature 1, no labels."""

from ..phases import Objective, Phase


PHASES = (Phase(objective=Objective(kl=1.0), learning_rate=0.3, attention_learning_rate=1.5, schedule="linear"),)
