"""EchoAtt's two stages: imitate the teacher, then continue on the text alone. Source: arXiv 2409.14595, section 3.3.

Shares are those of its token counts, 3.7B and 0.93B.
"""

from ..phases import Objective, Phase


PHASES = (
    Phase(share=0.8, objective=Objective(hidden_state=0.25, kl=0.25, teacher_choice=0.5)),
    Phase(share=0.2, objective=Objective(cross_entropy=1.0)),
)
