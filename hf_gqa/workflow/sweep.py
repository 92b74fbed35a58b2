"""Many plans for one donor, each converted, perhaps uptrained, and evaluated, in one table."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from ..convert.calibration import Calibration
from ..convert.donor import Donor, open_donor
from ..convert.model_kind import CAUSAL_LM, ENCODER, kind_of
from ..convert.plan import ConversionPlan
from ..convert.target import choose_target
from ..evaluate.evaluation import Evaluation
from ..evaluate.page.write_report import write_report
from ..evaluate.recipe import EvaluationRecipe
from ..evaluate.report import Report
from ..export.calibration_text import make_calibration
from ..export.write_student import convert_checkpoint
from ..reading import read_json
from ..refusal import Refusal
from ..staging import check_apart, replace_file
from ..uptrain.recipe import UptrainRecipe
from ..uptrain.run import UptrainRun
from .run_recipe import REPORT, STUDENT, calibration_of
from .sweep_plot import plot_sweep
from .sweep_table import (
    FORMAT,
    PLOT_FILE,
    SWEEP_FILE,
    TABLE_FILE,
    SweepTable,
    as_csv,
    cache_bytes_of,
    donor_hash,
    largest,
    row_of,
    with_front,
)


PLANS = "plans"


def check_comparable(donor: Donor, uptrained: bool) -> None:
    """Raises Refusal for a donor whose plans the table has no columns for, or that cannot be uptrained."""
    kind = kind_of(donor.model_class, donor.config)
    if uptrained and kind != CAUSAL_LM:
        raise Refusal(
            f"sweep: donor {donor.name} is a {donor.model_class.__name__}, and causal language models alone are uptrained. "
            f"Leave --uptrain out."
        )
    if kind in (None, ENCODER):
        raise Refusal(
            f"sweep: donor {donor.name} is a {donor.model_class.__name__}, which predicts no tokens, and the table compares "
            f"by loss. Evaluate each student with hf-gqa run."
        )


class Sweep:
    """Plans that have been checked, and not begun.

    Args:
        donor: folder or Hub repository; it is only read.
        output: folder to write; plans that it already holds, of the same recipes, are not run again.
        num_key_value_heads, methods, sharings: every combination is a plan.
        evaluation: how each is evaluated.
        calibration, calibration_tokens: text that methods look at the donor with, once for all plans.
        uptraining: how each is uptrained first; None: not at all. The donor is the teacher unless it names another.
        keep_students: leave the students in the plans' folders; otherwise only reports stay.

    Raises:
        Refusal: bad input, or an output folder that is no sweep's, or another sweep's.
    """

    def __init__(
        self,
        donor: str | Path,
        output: str | Path,
        num_key_value_heads: Sequence[int],
        evaluation: EvaluationRecipe,
        *,
        methods: Sequence[str] = ("mean_pool",),
        sharings: Sequence[str] = ("own",),
        calibration: Sequence[str] = (),
        calibration_tokens: int | None = None,
        uptraining: UptrainRecipe | None = None,
        seed: int = 0,
        keep_students: bool = False,
        overwrite: bool = False,
        announce: Callable[[str, int, int], None] = lambda plan, number, plans: None,
    ):
        self.donor_name, self.output = str(donor), Path(output).expanduser()
        self.evaluation, self.uptraining = evaluation, uptraining
        self.keep_students, self.announce = keep_students, announce
        self.calibration_text = {"files": list(calibration), "tokens": calibration_tokens}
        self.donor: Donor = open_donor(donor)
        check_comparable(self.donor, uptraining is not None)
        check_apart(self.output, self.donor.folder, "donor")
        self.plans = {
            f"{'+'.join(plan.method)}-{plan.sharing}-{plan.num_key_value_heads}": plan
            for heads in num_key_value_heads
            for method in methods
            for sharing in sharings
            for plan in [ConversionPlan(num_key_value_heads=heads, method=method, sharing=sharing, seed=seed)]
        }
        if not self.plans:
            raise Refusal("sweep: no plans. Give --num-key-value-heads, such as 4,2,1.")
        for plan in self.plans.values():
            choose_target(self.donor, plan)
        self._check_output(overwrite)

    @property
    def recipe(self) -> dict:
        """What two sweeps must agree on to share reports."""
        uptraining = self.uptraining.to_dict() if self.uptraining else None
        seed = next(iter(self.plans.values())).seed
        made = {"evaluate": self.evaluation.to_dict(), "uptrain": uptraining, "calibration": self.calibration_text}
        return made | {"seed": seed, "donor": self.identity}

    @cached_property
    def identity(self) -> str:
        """Read once: it may take the hash of many gigabytes."""
        return donor_hash(self.donor)

    @cached_property
    def calibration(self) -> Calibration | None:
        """Made once for all plans."""
        given = self.calibration_text
        return calibration_of(self.donor, given["files"], given["tokens"], make_calibration)

    def _check_output(self, overwrite: bool) -> None:
        if not self.output.exists():
            return
        recipe_file = self.output / PLANS / "recipe.json"
        if not self.output.is_dir() or (any(self.output.iterdir()) and not recipe_file.is_file()):
            raise Refusal(f"{self.output}: exists and no sweep wrote it. Give another output.")
        if overwrite:
            shutil.rmtree(self.output / PLANS, ignore_errors=True)
        elif recipe_file.is_file() and read_json(recipe_file, "Use --overwrite.") != self.recipe:
            raise Refusal(
                f"{self.output}: holds a sweep with another donor, text or uptraining. Give another output, or --overwrite."
            )

    def __call__(self) -> SweepTable:
        """Run every plan that has no report yet; the table and the plot are written anew after each."""
        (self.output / PLANS).mkdir(parents=True, exist_ok=True)
        replace_file(self.output / PLANS / "recipe.json", json.dumps(self.recipe, indent=2) + "\n")
        reports, table = {}, None
        for number, (name, plan) in enumerate(self.plans.items(), 1):
            self.announce(name, number, len(self.plans))
            reports[name] = self._report(self.output / PLANS / name, plan)
            table = self._table(reports)
            write_table(table, self.output)
        return table

    def _report(self, folder: Path, plan: ConversionPlan) -> Report:
        if (folder / REPORT).exists():
            return Report.read(folder / REPORT)
        converted = folder / "converted"
        convert_checkpoint(self.donor, converted, plan, calibration=self.calibration, overwrite=True)
        student, before = converted, None
        if self.uptraining is not None:
            student, before = folder / STUDENT, converted
            if not student.exists():
                unfinished = any((folder / f"{STUDENT}.unfinished").glob("checkpoint-*"))
                UptrainRun(converted, student, self.uptraining, resume=unfinished, overwrite=not unfinished).train()
        evaluation = Evaluation(student, self.donor, self.evaluation, converted=before, donor_name=self.donor_name)
        report = evaluation.run()
        write_report(report, folder / REPORT)
        if not self.keep_students:
            shutil.rmtree(converted)
            shutil.rmtree(folder / STUDENT, ignore_errors=True)
        return report

    def _table(self, reports: dict[str, Report]) -> SweepTable:
        first = next(iter(reports.values()))
        rows = [row_of(name, self.plans[name], report) for name, report in reports.items()]
        return SweepTable(
            format=FORMAT,
            donor=self.donor_name,
            donor_identity=self.identity,
            donor_loss_nats_per_token=first.donor.loss_nats_per_token,
            donor_perplexity=first.donor.perplexity,
            donor_cache_bytes_per_token=cache_bytes_of(first.donor),
            donor_parameters=first.donor.parameters,
            donor_decode_tokens_per_second=largest(first).donor_decode_tokens_per_second if first.speed else None,
            text_tokens=first.text.tokens,
            context_tokens=first.text.context_tokens,
            dtype=first.settings.dtype,
            device=first.settings.device,
            rows=with_front(rows),
        )


def write_table(table: SweepTable, folder: Path) -> None:
    """JSON, CSV and plot; each is replaced at one stroke."""
    replace_file(folder / SWEEP_FILE, json.dumps(asdict(table), indent=2, allow_nan=False) + "\n")
    replace_file(folder / TABLE_FILE, as_csv(table))
    replace_file(folder / PLOT_FILE, plot_sweep(table))
