"""Floor 4: continued training that gives a converted student its quality back."""

from ..text.packing import PackedCollator, packed_rows
from ..text.sampled import sampled_rows
from .callback import UptrainCallback
from .lora import lora_config
from .phases import Objective, Phase
from .recipe import UptrainRecipe
from .run import UptrainResult, uptrain
from .teacher import load_teacher
from .trainer import DistillationMixin, UptrainTrainer


__all__ = [
    "DistillationMixin",
    "Objective",
    "PackedCollator",
    "Phase",
    "UptrainCallback",
    "UptrainRecipe",
    "UptrainResult",
    "UptrainTrainer",
    "load_teacher",
    "lora_config",
    "packed_rows",
    "sampled_rows",
    "uptrain",
]
