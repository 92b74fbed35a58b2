"""lm_eval's tasks: its own command gives the same numbers, and nothing else in the process notices."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hf_gqa.evaluate.local_tasks import HERE, local_task_names, write_local_tasks
from hf_gqa.evaluate.quality.bootstrap import Bootstrap, expanded_tail
from hf_gqa.evaluate.tasks import lm_eval_tasks
from hf_gqa.evaluate.tasks.lm_eval_tasks import check_tasks, equivalent_command, run_tasks
from hf_gqa.refusal import Refusal

from .tiny_donors import tiny_donor
from .tiny_tokenizer import letter_tokenizer


pytest.importorskip("lm_eval", reason="needs the extra hf_gqa[eval]")
SUBJECTS = ("cat", "dog", "man", "ship", "hill", "tree", "door", "lamp", "road", "king", "wolf", "bell")
BOOTSTRAP = Bootstrap(resamples=200)


def documents(task: dict) -> list[dict]:
    """Twelve that have the task's fields."""
    every = [
        {
            "query": f"The {subject} is there, so",
            "choices": [f"{subject}s are red.", "we go home.", "no"],
            "gold": number % 3,
            "context_options": [f"The {subject} met Ann and Ann", f"The {subject} met Bob and Bob"],
            "context": f"It was the {subject}, they said, that {subject}. It was the",
            "continuation": subject,
        }
        for number, subject in enumerate(SUBJECTS)
    ]
    if "context_options" in task["metadata"]["fields"]:
        every = [document | {"gold": document["gold"] % 2} for document in every]
    return [{field: document[field] for field in task["metadata"]["fields"]} for document in every]


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    """A file for every local task."""
    folder = tmp_path_factory.mktemp("tasks folder")
    for name in local_task_names():
        task = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
        lines = [json.dumps(document) + "\n" for document in documents(task)]
        (folder / task["dataset_kwargs"]["data_files"]["test"]).write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models():
    donor, student = (tiny_donor("llama", seed=seed, max_position_embeddings=256) for seed in (0, 1))
    return donor, student, letter_tokenizer()


def test_every_local_task_scores_every_document(models, tasks_folder):
    names = [name for name in local_task_names() if name != "local_lambada_openai"]  # whose stderr takes seconds
    scores = run_tasks(*models, names, tasks_folder=tasks_folder, bootstrap=BOOTSTRAP)
    assert {score.task for score in scores} == set(names)
    for score in scores:
        assert score.samples == 12 and score.num_fewshot == 0 and score.version == "1.0" and score.higher_is_better
        assert score.donor * 12 == pytest.approx(round(score.donor * 12)) and score.donor_stderr > 0
        assert score.difference.value == pytest.approx(score.student - score.donor)
        assert score.difference.low <= score.difference.value <= score.difference.high


def test_a_choice_is_scored_by_the_likeliest_continuation(models, tasks_folder):
    """By hand: the whole text is read once for each choice, and the choice's tokens count."""
    donor, student, tokenizer = models
    (score,) = run_tasks(*models, ["local_copa"], tasks_folder=tasks_folder, batch_size=1, bootstrap=BOOTSTRAP)
    for model, accuracy in ((donor, score.donor), (student, score.student)):
        right = 0
        for line in (tasks_folder / "copa.jsonl").read_text(encoding="utf-8").splitlines():
            document, scores = json.loads(line), []
            for choice in document["choices"]:
                context, whole = (tokenizer(t).input_ids for t in (document["query"], f"{document['query']} {choice}"))
                logs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
                scores.append(sum(logs[place - 1, whole[place]].item() for place in range(len(context), len(whole))))
            right += scores.index(max(scores)) == document["gold"]
        assert accuracy == pytest.approx(right / 12)


def test_a_model_against_itself_differs_by_nothing_and_limit_shows(models, tasks_folder):
    donor, _, tokenizer = models
    (score,) = run_tasks(
        donor, donor, tokenizer, ["local_winogrande"], tasks_folder=tasks_folder, limit=9, bootstrap=BOOTSTRAP
    )
    assert (score.samples, score.difference.value, score.difference.low, score.difference.high) == (9, 0, 0, 0)


ROLLING = {
    "task": "rolling",
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


def test_perplexities_have_the_interval_of_their_difference(models, tmp_path, monkeypatch):
    """lm_eval weighs documents by their words or bytes; by hand, resampled as it aggregates them."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.tasks import TaskManager

    texts = [f"The {subject} is there" + number * " and there" for number, subject in enumerate(SUBJECTS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"data_files": {"test": str(tmp_path / "texts.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "rolling.yaml").write_text(yaml.safe_dump(ROLLING | {"dataset_kwargs": data}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "_task_manager", lambda *_: manager)
    kept = []
    monkeypatch.setattr(
        lm_eval_tasks, "_scores", lambda *given, scores=lm_eval_tasks._scores: (kept.append(given), scores(*given))[1]
    )
    found = {score.metric: score for score in run_tasks(*models, ["rolling"], bootstrap=BOOTSTRAP)}
    theirs, ours, _ = kept[0]
    random = np.random.default_rng(0)
    for name, aggregate in (
        ("word_perplexity", weighted_perplexity),
        ("byte_perplexity", weighted_perplexity),
        ("bits_per_byte", bits_per_byte),
    ):
        donor_D, student_D = (
            [sample[name] for sample in sorted(side["samples"]["rolling"], key=lambda sample: sample["doc_id"])]
            for side in (theirs, ours)
        )
        score, draws = found[name], [random.integers(12, size=12) for _ in range(2000)]
        drawn = [aggregate([student_D[d] for d in draw]) - aggregate([donor_D[d] for d in draw]) for draw in draws]
        assert score.donor == pytest.approx(aggregate(donor_D)) and score.student == pytest.approx(aggregate(student_D))
        assert score.difference.value == pytest.approx(score.student - score.donor, rel=1e-9)
        tail = expanded_tail(0.025, 12)
        low, high = np.quantile(drawn, [tail, 1 - tail])
        assert [score.difference.low, score.difference.high] == pytest.approx([low, high], abs=0.25 * (high - low))
        assert score.difference.low < score.difference.value < score.difference.high


def test_nothing_else_is_disturbed(models, tasks_folder, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    run_tasks(*models, ["local_copa"], tasks_folder=tasks_folder, limit=2, bootstrap=BOOTSTRAP)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    assert before == after
    assert models[2].pad_token is None and list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_fewshot", "metrics"),
    [
        (
            None,
            {
                "local_copa": ["acc"],
                "local_lambada_openai": ["perplexity", "acc"],
                "local_arc_easy": ["acc", "acc_norm"],
            },
        ),
        (2, {"local_winogrande": ["acc"], "local_copa": ["acc"]}),
    ],
)
def test_numbers_are_those_of_lm_evals_own_command(models, tasks_folder, tmp_path, num_fewshot, metrics):
    _, student, tokenizer = models
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "student")
    settings = {"limit": 11, "num_fewshot": num_fewshot, "batch_size": 4, "seed": 5}
    command = equivalent_command("student", list(metrics), tasks_folder, **settings)
    subprocess.run(
        ["bash", "-c", f"{command} --output_path results"],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        check=True,
        capture_output=True,
    )
    (written,) = (tmp_path / "results").rglob("results_*.json")
    expected = json.loads(written.read_text(encoding="utf-8"))
    scores = run_tasks(*models, metrics, tasks_folder=tasks_folder, **settings, bootstrap=BOOTSTRAP)
    assert [(score.task, score.metric) for score in scores] == [
        (task, one) for task in metrics for one in metrics[task]
    ]
    for score in scores:
        found = expected["results"][score.task]
        assert score.student == pytest.approx(found[f"{score.metric},none"], rel=1e-6)
        assert score.student_stderr == pytest.approx(found[f"{score.metric}_stderr,none"], rel=1e-6)
        assert score.samples == expected["n-samples"][score.task]["effective"] == 11
        assert score.num_fewshot == expected["n-shot"][score.task] == (num_fewshot or 0)
        assert score.higher_is_better is (score.metric != "perplexity")
        assert score.difference.value == pytest.approx(score.student - score.donor)


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_and_need_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        Refusal, match=r"^task 'arc_eazy' is unknown to lm_eval\. Did you mean .*arc_easy.*\? Ours are "
    ):
        check_tasks(["arc_eazy"])
    with pytest.raises(
        Refusal, match=r"^task 'arc_easy': its data is not to be had \(.*\)\. Go online, or use local tas"
    ):
        check_tasks(["arc_easy"])


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        (
            ["local_cop"],
            {},
            "task 'local_cop' is unknown to lm_eval. Did you mean local_copa or local_",
        ),
        (
            ["local_copa"],
            {"tasks_folder": None},
            "task 'local_copa': needs a tasks folder with its jsonl file. Give one",
        ),
        (
            ["local_copa"],
            {"tasks_folder": "nowhere"},
            "nowhere: no such folder. Give the one that holds the tasks' jsonl",
        ),
        (["local_copa"], {"limit": 0}, "tasks: limit = 0, at least 1 is needed. Give another, or leave it out."),
        (["local_copa"], {"num_fewshot": -1}, "tasks: num_fewshot = -1, at least 0 is needed. Give another, or leave "),
    ],
)
def test_bad_input(models, tasks_folder, tasks, changes, message):
    with pytest.raises(Refusal) as error:
        run_tasks(*models, tasks, **{"tasks_folder": tasks_folder, "bootstrap": BOOTSTRAP, **changes})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "task 'local_copa': needs {0}, which is not there. Give another tasks folder, or leave it out."),
        (b"", "{0}: holds no documents. Give the file of task 'local_copa', or leave it out."),
        (b"\n{not json}\n", "{0}: line 2 is no JSON in UTF-8 (Expecting property name"),
        (b'{"query": "\xff"}', "{0}: line 1 is no JSON in UTF-8 ('utf-8' codec can't decode"),
        (b"[1]", "{0}: line 1 has no query, choices, gold. Correct it, or leave task 'local_copa' out."),
        (b'{"query": "x", "gold": 0}', "{0}: line 1 has no choices. Correct it, or leave task 'local_copa' out."),
        (
            b'{"query": "x", "choices": ["a", "b"], "gold": 2}',
            "{0}: line 1 has gold = 2, which is none of its choices. ",
        ),
        (
            b'{"query": "x", "choices": ["a", "b"], "gold": "a"}',
            "{0}: line 1 has gold = 'a', which is none of its choi",
        ),
    ],
)
def test_bad_data(tmp_path, content, message):
    data = tmp_path / "copa.jsonl"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(Refusal) as error:
        check_tasks(["local_copa"], tmp_path)
    assert str(error.value).startswith(message.format(data))


def test_local_tasks_are_written_for_the_files_there_are(tmp_path, tasks_folder):
    assert write_local_tasks(tasks_folder, tmp_path / "all") == tuple(local_task_names())
    (tmp_path / "some").mkdir()
    with pytest.raises(
        Refusal, match=r"some: holds no file of a local task\. Give a folder with some of arc_challenge\."
    ):
        write_local_tasks(tmp_path / "some", tmp_path / "none")
    (tmp_path / "some/copa.jsonl").write_bytes((tasks_folder / "copa.jsonl").read_bytes())
    assert write_local_tasks(tmp_path / "some", tmp_path / "one") == ("local_copa",)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["local_copa.yaml"]


def test_without_lm_eval_the_extra_is_named(models, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        Refusal, match=r"^tasks: lm_eval cannot be imported \(.*\)\. Run pip install 'hf_gqa\[eval\]', or "
    ):
        run_tasks(*models, ["arc_easy"], bootstrap=BOOTSTRAP)
    assert run_tasks(*models, [], bootstrap=BOOTSTRAP) == ()


def test_the_command_of_hub_tasks_needs_no_preparation():
    assert equivalent_command("my student", ["arc_easy", "piqa"], trust_remote_code=True) == (
        "python -m lm_eval --model hf --model_args 'pretrained=my student,dtype=float32,softmax_dtype=float32' "
        "--tasks arc_easy,piqa --device cpu --batch_size 8 --seed 0 --trust_remote_code"
    )
