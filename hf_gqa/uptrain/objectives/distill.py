"""Each attention module learns what the teacher's puts out on the teacher's own input to it.

Conversion changed nothing but attention, so nothing else needs to be learned; and where every layer gets the teacher's
input, none waits until those below it have learned. Sources: block-wise distillation (Puzzle, arXiv 2411.19146) and
attention transfer (LoLCATs, arXiv 2410.10254). Measured against KL and cross-entropy in docs/uptraining.md.
"""

from ..phases import Objective, Phase


PHASES = (
    Phase(
        objective=Objective(attention_output=1.0, teacher_forced=True),
        train="attention",
        learning_rate=3.0,
        schedule="linear",
    ),
)
