"""From a donor on disk and some text to the layers that shall share."""

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..convert.calibration import fingerprint
from ..convert.donor import Donor, open_donor
from ..convert.student import load_tokenizer
from ..convert.target import choose_target
from ..evaluate.inputs.opened import device_of
from ..evaluate.quality.bootstrap import Bootstrap
from ..progress_bar import progress_bar
from ..text.source import keep_bars_on_terminals
from .borrowing import RowScores, Sharing, measure_sharings
from .candidates import candidate_pairs, check_donor, layer_kinds, resolved_sample_tokens, rows_of_text
from .choices import check_budget, choices_by_number, first_that_meets, plan_of, shortlist
from .echoatt import kept_layers, mean_similarity
from .prices import PriceList
from .recipe import AnalysisRecipe
from .result import FORMAT, AnalysisResult, Chosen, PairCost
from .similarity import attention_similarity
from .solver import Choice


TOKENS_AT_ONCE = 4096


class Analysis:
    """An analysis that has been checked and explained, and not begun.

    Args:
        donor: folder, Hub repository, or a donor opened with `open_donor`; it is only read.
        recipe: what to look at; or give its fields, as in `text=["held_out.txt"]`.

    Raises:
        Refusal: bad input, too little text, a donor whose layers cannot share, a budget that no plan meets.
    """

    def __init__(self, donor: str | Path | Donor, recipe: AnalysisRecipe | None = None, **recipe_fields):
        keep_bars_on_terminals()
        self.recipe = recipe if recipe is not None else AnalysisRecipe.from_dict(recipe_fields)
        self.donor: Donor = donor if isinstance(donor, Donor) else open_donor(donor)
        check_donor(self.donor)
        self.kinds = layer_kinds(self.donor)
        self.pairs = candidate_pairs(self.kinds, self.recipe.reach, self.donor.name)
        one_borrower = Choice(owners=dict(self.pairs[:1]), saved=1, cost=0.0)
        choose_target(self.donor, plan_of(self.donor, self.recipe, one_borrower))  # refuses what cannot be converted
        length = resolved_sample_tokens(self.donor, self.recipe.sample_tokens)
        self.batch_size = self.recipe.batch_size or max(1, TOKENS_AT_ONCE // length)
        self.wanted_rows = 2 * max(1, self.recipe.tokens // length)
        self.tokens_NT = rows_of_text(self.recipe, load_tokenizer(self.donor.folder), length, self.wanted_rows)
        self.model = self._load()
        self.prices = PriceList(self.donor, self.model, self.recipe.num_key_value_heads)
        check_budget(self.recipe, self.kinds, self.pairs, self.prices, self.donor.name)

    def _load(self) -> PreTrainedModel:
        dtype = "auto" if self.recipe.dtype == "auto" else getattr(torch, self.recipe.dtype)
        model = self.donor.model_class.from_pretrained(self.donor.folder, config=self.donor.model_config, dtype=dtype)
        return model.eval().requires_grad_(False).to(device_of(self.recipe.device))

    @property
    def to_choose_NT(self) -> torch.Tensor:
        return self.tokens_NT[::2]

    @property
    def to_check_NT(self) -> torch.Tensor:
        """Rows between those that are chosen by."""
        return self.tokens_NT[1::2]

    @property
    def samples_NT(self) -> torch.Tensor:
        """Of the rows to choose by, as many as similarity is averaged over."""
        rows = len(self.to_choose_NT)
        picked = np.linspace(0, rows - 1, min(rows, self.recipe.samples)).round().astype(int)
        return self.to_choose_NT[picked]

    def explanation(self) -> dict:
        """What will be run, before it is; one row is read for it, twice."""
        layers = len(self.kinds)
        by_kl = self.recipe.budgets and self.recipe.choose_by == "kl"
        candidates = 1 + self.recipe.candidates if by_kl else 0
        rows = len(self.samples_NT) + (1 + len(self.pairs) + candidates) * len(self.to_choose_NT)
        most = rows + (1 + 3 * (layers - 1) + 2) * len(self.to_check_NT)  # three choosers, the paper's blocks, the plan
        return {
            "donor": self.donor.name,
            "sharing": self.recipe.sharing,
            "layers": layers,
            "pairs": len(self.pairs),
            "sample_tokens": self.tokens_NT.shape[1],
            "samples": len(self.samples_NT),
            "tokens_to_choose": self.to_choose_NT.numel(),
            "tokens_to_check": self.to_check_NT.numel(),
            "forward_passes": most,
            "seconds": most * self._seconds_per_row(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }

    @torch.inference_mode()
    def _seconds_per_row(self) -> float:
        rows = self.tokens_NT[:1].to(self.model.device)
        for _ in range(2):  # the first is slower
            begun = time.perf_counter()
            self.model(rows, use_cache=False).logits[0, -1, 0].item()
        return time.perf_counter() - begun

    def run(self) -> AnalysisResult:
        """Measure similarity and pairs, choose, and check each choice on other text.

        Raises:
            Refusal: NaN or Inf, or a model that does not call its attention through transformers' AttentionInterface.
        """
        begun = time.perf_counter()
        with progress_bar("Similarity", len(self.samples_NT), "sample") as bar:
            similarity = attention_similarity(self.model, self.donor.layout, self.samples_NT, bar.update).numpy()
        singles = [{borrower: owner} for borrower, owner in self.pairs]
        scores = self._measured("Pairs", singles, self.to_choose_NT)
        costs = {pair: max(0.0, one.kl) for pair, one in zip(self.pairs, scores, strict=True)}
        picked = choices_by_number(self.kinds, costs, similarity, self.recipe.block_layers)
        chosen = self._planned(costs, picked)
        if chosen is not None:
            picked.append(("plan", chosen))
        donor, checked = self._checked(picked)
        return AnalysisResult(
            format=FORMAT,
            donor=self.donor.name,
            donor_fingerprint=fingerprint(self.donor),
            sharing=self.recipe.sharing,
            recipe=self.recipe.to_dict(),
            text_sha256=hashlib.sha256(self.tokens_NT.to(torch.int32).numpy().tobytes()).hexdigest(),
            tokens_to_choose=self.to_choose_NT.numel(),
            tokens_to_check=self.to_check_NT.numel(),
            samples=len(self.samples_NT),
            sample_tokens=self.tokens_NT.shape[1],
            kinds=self.kinds,
            similarity=tuple(map(tuple, similarity.tolist())),
            mean_similarity=tuple(mean_similarity(similarity).tolist()),
            kept=tuple(kept_layers(similarity)),
            pairs=tuple(map(_pair_cost, self.pairs, scores)),
            donor_loss=donor.loss,
            donor_cache_bytes_per_token=self.prices.of_sharing(self.recipe.sharing, {}).cache_bytes_per_token,
            donor_parameters=self.prices.of_sharing(self.recipe.sharing, {}).parameters,
            choices=checked,
            plan=None if chosen is None else plan_of(self.donor, self.recipe, chosen).to_dict(),
            seconds=time.perf_counter() - begun,
            notes=tuple(self._notes()),
        )

    def _planned(self, costs: dict[tuple[int, int], float], picked: list[tuple[str, Choice]]) -> Choice | None:
        if self.recipe.choose_by == "similarity":
            ordered = [choice for chooser, choice in picked if chooser == "echoatt"]
            return first_that_meets(self.recipe, ordered, self.prices)
        return self._best_of(shortlist(self.recipe, self.kinds, costs, self.prices))

    def _best_of(self, candidates: list[Choice]) -> Choice | None:
        """Measured whole, on the text to choose by: borrowers of one owner may hurt each other, which no sum sees."""
        if len(candidates) < 2:
            return next(iter(candidates), None)
        scores = self._measured("Candidates", [choice.owners for choice in candidates], self.to_choose_NT)
        return min(zip(candidates, scores, strict=True), key=lambda pair: pair[1].kl)[0]

    def _measured(self, words: str, sets: Sequence[dict[int, int]], tokens_NT: torch.Tensor) -> list[RowScores]:
        sharings = [Sharing(pattern=self.recipe.sharing, owners=owners) for owners in sets]
        with progress_bar(words, len(sets) * len(tokens_NT), "row") as bar:
            return measure_sharings(self.model, self.donor.layout, tokens_NT, sharings, self.batch_size, bar.update)

    def _checked(self, picked: list[tuple[str, Choice]]) -> tuple[RowScores, tuple[Chosen, ...]]:
        """The donor's scores and those of all choices together; the same layers are measured once."""
        sets = {tuple(sorted(choice.owners.items())): choice.owners for _, choice in picked}
        donor, *scores = self._measured("Checking", [{}, *sets.values()], self.to_check_NT)
        by_owners = dict(zip(sets, scores, strict=True))
        return donor, tuple(self._chosen(chooser, choice, by_owners) for chooser, choice in picked)

    def _chosen(self, chooser: str, choice: Choice, scores: dict[tuple, RowScores]) -> Chosen:
        owners = tuple(sorted(choice.owners.items()))
        price, found = self.prices.of_sharing(self.recipe.sharing, choice.owners), scores[owners]
        return Chosen(
            chooser=chooser,
            owners=owners,
            summed_kl=None if math.isnan(choice.cost) else choice.cost,
            kl=found.kl,
            loss=found.loss,
            top1_agreement=found.top1_agreement,
            cache_bytes_per_token=price.cache_bytes_per_token,
            parameters=price.parameters,
        )

    def _notes(self) -> list[str]:
        notes = []
        if len(self.tokens_NT) < self.wanted_rows:
            notes.append(
                f"The text gave {self.tokens_NT.numel():,} tokens, half of them to choose by; "
                f"{self.wanted_rows * self.tokens_NT.shape[1]:,} were asked for."
            )
        if len(self.samples_NT) < self.recipe.samples:
            notes.append(f"Similarity was averaged over {len(self.samples_NT)} samples, not {self.recipe.samples}.")
        if self.recipe.num_key_value_heads is not None:
            notes.append("Costs were measured with the donor's own KV heads; fewer of them cost something on top.")
        return notes


def _pair_cost(pair: tuple[int, int], scores: RowScores) -> PairCost:
    interval = Bootstrap().interval(scores.kl_N, np.full(len(scores.kl_N), scores.tokens))
    ends = None if interval is None else (interval.low, interval.high)
    return PairCost(borrower=pair[0], owner=pair[1], kl=scores.kl, interval=ends)
