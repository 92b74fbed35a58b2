"""The folder of an analysis: its values, its heatmap, and the plan if there is one."""

from pathlib import Path

import yaml

from ..staging import check_folder_of, staged_folder
from .heatmap import draw_heatmap
from .result import HEATMAP_FILE, PLAN_FILE, RESULT_FILE, AnalysisResult


FILES = (RESULT_FILE, HEATMAP_FILE, PLAN_FILE)


def check_analysis_folder(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, or that is not an analysis's to replace."""
    check_folder_of(output, overwrite, FILES, "analysis")


def write_analysis(result: AnalysisResult, output: Path, *, overwrite: bool = False) -> None:
    """`analysis.json`, `heatmap.svg` and, for a budget, `plan.yaml`, in a folder that appears complete or not at all."""
    check_analysis_folder(output, overwrite)
    with staged_folder(output, overwrite) as staging:
        (staging / RESULT_FILE).write_text(result.to_json(), encoding="utf-8")
        (staging / HEATMAP_FILE).write_text(draw_heatmap(result), encoding="utf-8")
        if result.plan is not None:
            (staging / PLAN_FILE).write_text(yaml.safe_dump(result.plan, sort_keys=False), encoding="utf-8")
