"""Everything about a run that can be refused before its first step: nobody trains for a day to hear of a missing file."""

from pathlib import Path

from ..convert.donor import Donor
from ..evaluate.cost.memory import parse_memory
from ..evaluate.inputs.opened import device_of
from ..evaluate.measuring.measured import longest_context
from ..evaluate.recipe import EvaluationRecipe
from ..evaluate.tasks.lm_eval_tasks import check_tasks
from ..refusal import Refusal
from ..text.source import TextSource, check_source
from ..uptrain.recipe import UptrainRecipe


def check_evaluation(recipe: EvaluationRecipe, donor: Donor) -> None:
    """Devices, sizes, tasks and files; what only the models can tell is told when they are loaded.

    Raises:
        Refusal: the first thing that cannot be had.
    """
    for size in recipe.memory:
        parse_memory(size)
    device_of(recipe.device)
    longest_context(recipe, donor.longest_tokens)
    if recipe.sampled_tokens is None:
        check_source(recipe.text_source())
    check_tasks(recipe.tasks, Path(recipe.tasks_folder).expanduser() if recipe.tasks_folder else None)


def check_uptraining(recipe: UptrainRecipe, donor: Donor) -> None:
    """Files of text and lengths. Raises Refusal for the first that cannot be had."""
    longest = donor.longest_tokens
    if longest is not None and (recipe.sequence_length or 0) > longest:
        raise Refusal(
            f"sequence_length = {recipe.sequence_length:,}: the donor has positions for {longest:,} tokens. Use "
            f"{longest:,} or fewer."
        )
    if not recipe.sample_from_teacher:
        check_source(recipe.text_source())
    if recipe.eval_file:
        check_source(TextSource(train_file=recipe.eval_file))
