"""From a donor to a healed student with its report and its card, by one recipe."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import torch
import yaml

from ..convert.calibration import Calibration
from ..convert.donor import Donor, open_donor
from ..convert.plan import ConversionPlan
from ..convert.target import choose_target
from ..evaluate.evaluation import Evaluation
from ..evaluate.page.write_report import write_report
from ..evaluate.recipe import EvaluationRecipe
from ..evaluate.report import PAGE_FILE, Report
from ..export.calibration_text import DEFAULT_TOKENS, calibration_text
from ..export.explanation import explain
from ..export.licence import find_licence, licence_of_donor
from ..export.model_card import make_card, write_card
from ..export.write_student import convert_checkpoint
from ..reading import read_yaml
from ..recipe import Recipe, check_keys
from ..refusal import Refusal
from ..staging import check_apart, replace_file
from ..uptrain.recipe import UptrainRecipe
from ..uptrain.run import UptrainRun
from .early import check_evaluation, check_uptraining


RECIPE_FILE, CONVERTED, STUDENT, REPORT = "recipe.yaml", "converted", "student", "report"
STAGES = "conversion", "uptraining", "evaluation"  # each depends on those before it
STAGE_OF = {"uptrain": "uptraining", "evaluate": "evaluation"}  # by key of the recipe; all other keys are of the first
# Where nothing is uptrained, the conversion writes the student.
MADE_BY = {
    "conversion": (CONVERTED, STUDENT),
    "uptraining": (STUDENT, f"{STUDENT}.unfinished"),
    "evaluation": (REPORT,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe(Recipe):
    """Everything from donor to card; exact round trip through YAML, unknown keys refused.

    Args:
        donor: folder or Hub repository; it is only read.
        output_dir: folder that holds all that is made.
        convert: the plan, as in `num_key_value_heads: 2`.
        uptrain: keys of `hf-gqa uptrain`; the donor teaches, unless the objective is cross_entropy or there is another
            teacher. None: the student stays as it was converted.
        evaluate: keys of `hf-gqa evaluate`.
        calibration, calibration_tokens: text that methods look at the donor with, as for `hf-gqa convert`.
        revision: commit of the donor on the Hub.

    Raises:
        Refusal: unknown keys or values, in any part.
    """

    donor: str
    output_dir: str
    convert: ConversionPlan
    evaluate: EvaluationRecipe
    uptrain: UptrainRecipe | None = None
    calibration: tuple[str, ...] = ()
    calibration_tokens: int | None = None
    revision: str | None = None

    def __post_init__(self):
        for name in ("donor", "output_dir"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise Refusal(f"{name} = {value!r} names nothing. Give a folder.")
        if isinstance(self.convert, dict):
            object.__setattr__(self, "convert", ConversionPlan.from_dict(self.convert))
        if isinstance(self.evaluate, dict):
            object.__setattr__(self, "evaluate", EvaluationRecipe.from_dict(self.evaluate, "evaluate"))
        if isinstance(self.uptrain, dict):
            object.__setattr__(self, "uptrain", UptrainRecipe.from_dict(taught_by(self.donor, self.uptrain), "uptrain"))
        self.check_fields()

    def to_dict(self) -> dict:
        plan = {f.name: f.default for f in fields(ConversionPlan) if f.default is not MISSING}
        made = self.convert.to_dict()
        kept = {name: value for name, value in made.items() if name not in plan or value != _listed(plan[name])}
        return Recipe.to_dict(self) | {"convert": kept}


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def taught_by(donor: str, uptrain: dict) -> dict:
    """The keys of an uptraining recipe, with the donor as teacher unless they say otherwise."""
    silent = not uptrain.keys() & {"teacher", "teacher_logits"} and uptrain.get("objective") != "cross_entropy"
    return {"teacher": donor, **uptrain} if silent else uptrain


def read_run_recipe(path: str | Path, **instead) -> RunRecipe:
    """Raises Refusal for a file that is no such recipe.

    Args:
        instead: values that win over those of the file.
    """
    values = RunRecipe.read(Path(path).expanduser()) | instead
    check_keys(RunRecipe, values, str(path))
    return RunRecipe(**values)


class Run:
    """A recipe being followed; each stage appears whole or not at all, and is not done twice.

    Args:
        resume: go on where an earlier run of the same recipe stopped.
        overwrite: discard what an earlier run made.
        announce: told what each stage will do before it does it: (stage, its explanation).

    Raises:
        Refusal: bad input, or an output folder that is not this recipe's.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        *,
        resume: bool = False,
        overwrite: bool = False,
        announce: Callable[[str, object], None] = lambda stage, explanation: None,
    ):
        self.recipe, self.resume, self.overwrite, self.announce = recipe, resume, overwrite, announce
        self.folder = Path(recipe.output_dir).expanduser()
        self.donor: Donor = open_donor(recipe.donor, revision=recipe.revision)
        check_apart(self.folder, self.donor.folder, "donor")
        self.stale = stages_to_do_again(self.folder, recipe.to_dict(), resume, overwrite)
        self.conversion = explain(self.donor, recipe.convert, choose_target(self.donor, recipe.convert))
        check_evaluation(recipe.evaluate, self.donor)
        if recipe.uptrain is not None:
            check_uptraining(recipe.uptrain, self.donor)
        for file in recipe.calibration:
            if not Path(file).expanduser().exists():
                raise Refusal(f"calibration: {file}: no such file. Check its path.")

    def __call__(self) -> Report:
        """Convert, uptrain, evaluate, and write the card; what is there already is kept."""
        if self.folder.exists():
            discard(self.folder, self.stale)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        replace_file(self.folder / RECIPE_FILE, text)
        converted = self.folder / (CONVERTED if self.recipe.uptrain else STUDENT)
        if not converted.exists():
            self.announce("convert", self.conversion)
            known = calibration_of(self.donor, self.recipe.calibration, self.recipe.calibration_tokens)
            convert_checkpoint(self.donor, converted, self.recipe.convert, calibration=known)
        student = self.folder / STUDENT
        if not student.exists():
            unfinished = any((self.folder / f"{STUDENT}.unfinished").glob("checkpoint-*"))
            training = UptrainRun(converted, student, self.recipe.uptrain, resume=unfinished, overwrite=not unfinished)
            self.announce("uptrain", training.explanation())
            training.train()
        report = self._evaluated(student, converted)
        self._card(report, student)
        return report

    def _evaluated(self, student: Path, converted: Path) -> Report:
        folder = self.folder / REPORT
        if folder.exists():
            return Report.read(folder)
        before = converted if converted != student else None
        evaluation = Evaluation(
            student, self.donor, self.recipe.evaluate, converted=before, donor_name=self.recipe.donor
        )
        self.announce("evaluate", evaluation.explanation())
        report = replace(evaluation.run(), recipe=self.recipe.to_dict())
        write_report(report, folder)
        return report

    def _card(self, report: Report, student: Path) -> None:
        try:
            licence = licence_of_donor(self.recipe.donor, student)
        except Refusal:  # the donor's card is not to be had, which is no reason to lose the run
            licence = find_licence(student)
        card = make_card(report, student, name=self.folder.resolve().name, licence=licence)
        write_card(card, report, student, licence, self.folder / REPORT / PAGE_FILE)
        self.announce("card", student)


def calibration_of(
    donor: Donor, files: Sequence[str], tokens: int | None, read: Callable = calibration_text
) -> Calibration | torch.Tensor | None:
    """What methods look at the donor with, text by default; None where nobody asked for it."""
    if not files and tokens is None:
        return None
    return read(donor, files, DEFAULT_TOKENS if tokens is None else tokens)


def stages_to_do_again(folder: Path, recipe: dict, resume: bool, overwrite: bool) -> tuple[str, ...]:
    """What of an earlier run no longer is what the recipe asks for: a stage that it changed, and those after it.

    With --resume a changed evaluation is done again; to lose a conversion or an uptraining takes --overwrite too, which by
    itself loses everything.

    Raises:
        Refusal: the folder is not an earlier run's, or one was found and neither flag says what to do with it.
    """
    if not folder.exists():
        if resume:
            raise Refusal(f"{folder}: no such folder, so there is nothing to resume. Run without --resume.")
        return ()
    earlier = folder / RECIPE_FILE
    if not folder.is_dir() or (not earlier.is_file() and any(folder.iterdir())):
        raise Refusal(f"{folder}: exists and no run wrote it. Give another output_dir.")
    if not earlier.is_file():
        return ()
    if not resume and not overwrite:
        raise Refusal(f"{folder}: holds an earlier run. Use --resume to go on with it, or --overwrite to discard it.")
    if not resume:
        return STAGES
    found = read_yaml(earlier, "Use --overwrite to discard the run.")
    found = found if isinstance(found, dict) else {}
    changed = sorted((key for key in recipe.keys() | found.keys() if recipe.get(key) != found.get(key)), key=str)
    stages = [STAGE_OF.get(key, STAGES[0]) for key in changed if key != "output_dir"]
    stale = STAGES[min(map(STAGES.index, stages)) :] if stages else ()
    if stale and stale[0] != STAGES[-1] and not overwrite:
        key = next(key for key in changed if STAGE_OF.get(key, STAGES[0]) == stale[0])
        raise Refusal(
            f"{earlier}: was made with another '{key}' ({json.dumps(found.get(key))[:120]}). Use that, or add --overwrite to do "
            f"{' and '.join(stale)} again."
        )
    return stale


def discard(folder: Path, stages: Sequence[str]) -> None:
    """What these stages made, and nothing else."""
    for name in (name for stage in stages for name in MADE_BY[stage]):
        shutil.rmtree(folder / name, ignore_errors=True)
