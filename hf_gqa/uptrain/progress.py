"""What a run shows while it runs, and the plot it leaves."""

import math
from pathlib import Path

from transformers import TrainerCallback

from ..progress_bar import progress_bar


class UptrainProgress(TrainerCallback):
    """One bar over the budget's tokens, with the loss and the share of the gap that is closed; hidden off terminals."""

    def __init__(self, budget_tokens: int):
        self.budget_tokens, self.bar, self.facts = budget_tokens, None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        shown = state.is_world_process_zero
        self.bar = progress_bar("Uptraining", self.budget_tokens, "tok", shown=shown, unit_scale=True)
        self.bar.update(min(self.budget_tokens, state.num_input_tokens_seen))

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(min(self.budget_tokens, state.num_input_tokens_seen) - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, name in (("loss", "loss"), ("eval_loss", "eval"), ("eval_gap_closed_fraction", "gap closed")):
            if key in (logs or {}):
                self.facts[name] = f"{logs[key]:.0%}" if key.endswith("fraction") else f"{logs[key]:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.facts)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Held-out cross-entropy over tokens, between the student as it came and its teacher, and the training loss below."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    evaluated = [entry for entry in log_history if "eval_loss" in entry]
    trained = [entry for entry in log_history if "loss" in entry and math.isfinite(entry["loss"])]
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasSVG(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    tokens = [entry["tokens_seen"] for entry in evaluated]
    above.plot(tokens, [entry["eval_loss"] for entry in evaluated], marker="o", label="student")
    if evaluated and "eval_teacher_loss" in evaluated[-1]:
        above.axhline(evaluated[-1]["eval_teacher_loss"], color="tab:green", linestyle="--", label="teacher")
    above.set_ylabel("held-out loss, nats per token")
    above.legend()
    below.plot([entry["tokens_seen"] for entry in trained], [entry["loss"] for entry in trained], color="tab:gray")
    below.set_ylabel("training loss")
    below.set_xlabel("tokens seen")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path)
