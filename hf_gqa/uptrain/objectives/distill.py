"""Each attention module learns what the teacher's puts out on the teacher's own input to it; then all together, briefly.

Conversion changed nothing but attention, so nothing else needs to be learned; and where every layer gets the teacher's
input, none waits until those below it have learned. What is left are errors that add up over layers: the last quarter
learns the teacher's token distribution end to end. Sources: block-wise distillation (Puzzle, arXiv 2411.19146), attention
transfer (LoLCATs, arXiv 2410.10254), KL (Minitron, arXiv 2407.14679). Measured against KL and cross-entropy in
docs/uptraining.md.
"""

from ..phases import Objective, Phase


PHASES = (
    Phase(
        share=0.75,
        objective=Objective(attention_output=1.0, teacher_forced=True),
        train="attention",
        learning_rate=3.0,
        schedule="linear",
    ),
    Phase(
        share=0.25,
        objective=Objective(kl=1.0),
        train="attention",
        learning_rate=0.05,
        attention_learning_rate=0.2,
        schedule="linear",
    ),
)
