"""The model card: every number in it is its report's, the licence its donor's, and names from outside do nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_gqa import Refusal, convert_checkpoint
from hf_gqa.export import card_lint, model_card
from hf_gqa.export.card_lint import lint_card
from hf_gqa.export.card_tables import tables
from hf_gqa.export.licence import find_licence, licence_of_donor
from hf_gqa.export.markdown import block, code, plain
from hf_gqa.export.model_card import TEMPLATE, card_of, make_card, report_sha256
from hf_gqa.human_units import number

from .command_line import assert_one_message, run_cli
from .donor_folders import write_donor
from .sample_report import sample_report


REPOSITORY = Path(__file__).resolve().parents[1]
HOSTILE = "a|b`c``d\n---\n# x <script>alert(1)</script> ![i](http://x.y) {{ card_data }} <!-- - : 'q' \"r\" \\"


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    folder = write_donor(tmp_path_factory.mktemp("donor") / "donor")
    (folder / "LICENSE").write_text("Do as you please.\n")
    return folder


@pytest.fixture(scope="module")
def converted(donor) -> Path:
    convert_checkpoint(donor, donor.parent / "student", num_key_value_heads=2)
    return donor.parent / "student"


@pytest.fixture
def student(tmp_path, converted) -> Path:
    return shutil.copytree(converted, tmp_path / "student")


def report_of(student: Path, **changes):
    conversion = json.loads((student / "conversion_manifest.json").read_text())
    return sample_report(**{"conversion": conversion, **changes})


def write_report(folder: Path, student: Path, **changes) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(report_of(student, **changes).to_json())
    (folder / "report.html").write_text("<p>page</p>")
    return folder


def state_licence(donor: Path, *lines: str) -> None:
    (donor / "README.md").write_text("\n".join(["---", *lines, "---", "# Donor"]))


def test_metadata(student):
    data = ModelCard(str(make_card(report_of(student), student))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("donor", "finetune")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"gqa", "hf-gqa", "kv-cache"} <= set(data["tags"]) and "language" not in data and "datasets" not in data
    metrics = {
        (result["dataset"]["name"], metric["type"]): metric
        for result in data["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert metrics["corpora/held-out.txt", "perplexity"]["value"] == 24.0468
    assert metrics["corpora/held-out.txt", "kl_divergence"]["value"] == 0.0912
    assert metrics["lambada_local", "acc"]["value"] == 0.286
    assert "stderr 0.0202" in metrics["lambada_local", "acc"]["name"]


def test_body(student):
    text = str(make_card(report_of(student), student, name="someone/two-heads"))
    for words in (
        "# someone/two-heads\n",
        "| perplexity | 22.2 | 24.05 | 1.083x (1.074x to 1.093x) |",
        "| cache per token, measured | 12 KiB | 3 KiB |",
        "KV heads of a layer: 2 instead of 8",
        'from_pretrained("someone/two-heads", dtype="auto")',
        "- Not trained after its conversion.",
        "  num_key_value_heads:\n  - 2\n",
        "hf-gqa evaluate students/two-heads --donor examples/donor",
        report_sha256(report_of(student)),
    ):
        assert words in text, words
    assert "trust_remote_code" not in text and not re.search(r"[{}]{2}|\bNone\b", text)


def test_bundle_is_loaded_at_a_commit_that_was_read(student):
    report = report_of(student)
    text = str(card_of(replace(report, conversion=report.conversion | {"export": "bundle"}), **names(student)))
    assert "revision=commit, trust_remote_code=True" in text and "Read them first" in text


def names(student: Path) -> dict:
    return {"name": "student", "base_model": "donor", "licence": find_licence(student)}


def test_uptraining_and_its_data_set_are_named(student):
    conversion = report_of(student).conversion
    trained = {"tokens_seen": 2_000_000, "recipe": {"dataset_name": "someone/books"}}
    card = card_of(sample_report(conversion=conversion | {"uptraining": trained}), **names(student))
    assert "Uptrained after its conversion on 2M (2,000,000) tokens." in str(card)
    assert card.data.datasets == ["someone/books"]
    for dataset in ("text", "./books", None):
        trained["recipe"]["dataset_name"] = dataset
        assert (
            card_of(sample_report(conversion=conversion | {"uptraining": trained}), **names(student)).data.datasets
            is None
        )


def test_what_was_not_measured_is_said(student):
    report = report_of(student, retrieval=(), tasks=(), speed=(), capacity=(), by_context=())
    text = str(make_card(replace(report, text=replace(report.text, longest_context_tokens=4096)), student))
    for words in (
        "Recall from the context was not measured",
        "No task of a benchmark",
        "Speed was not measured",
        "takes 4,096",
    ):
        assert words in text
    assert "tokens/s" not in text and "\n\n\n" not in text.partition("---\n\n")[2]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["license: apache-2.0"], ("apache-2.0", None, None)),
        (["license: other", "license_name: mine-1", "license_link: LICENSE"], ("other", "mine-1", "LICENSE")),
        (["tags: [x]"], ("other", "license-of-the-donor", "LICENSE")),
    ],
)
def test_licence_is_the_donors(student, donor, tmp_path, lines, expected):
    donor = shutil.copytree(donor, tmp_path / "donor")
    state_licence(donor, *lines)
    found = licence_of_donor(str(donor), student)
    assert (found.license, found.license_name, found.license_link) == expected


def test_without_any_licence_none_is_claimed(student):
    (student / "LICENSE").unlink()
    card = make_card(report_of(student), student)
    assert not {"license", "license_name", "license_link"} & card.data.to_dict().keys()
    assert "Licence: the donor states none that is known here" in str(card)


def test_licence_of_another_donor_is_refused(student, tmp_path):
    other = write_donor(tmp_path / "donor", hidden_size=64)
    with pytest.raises(Refusal, match="not the donor in the manifest"):
        licence_of_donor(str(other), student)


def test_card_of_another_student_is_refused(student):
    with pytest.raises(Refusal, match="the report is of another student"):
        make_card(sample_report(), student)


def test_command_writes_the_card_and_its_evidence(student, tmp_path, donor):
    report = write_report(tmp_path / "report", student)
    copy = shutil.copytree(donor, tmp_path / "donor")
    state_licence(copy, "license: apache-2.0")
    result = run_cli("card", student, "--report", report, "--donor", copy, "--name", "me/two-heads")
    assert result.exit_code == 0, result.output
    for name in ("report.json", "report.html"):
        assert (student / "evaluation" / name).read_bytes() == (report / name).read_bytes()
    card = ModelCard.load(student / "README.md")
    assert card.data.license == "apache-2.0" and not list(student.rglob(".*partial*"))
    assert run_cli("card", student, "--check").exit_code == 0
    assert run_cli("card", student).exit_code == 0  # again, from what lies there; the licence is remembered
    assert ModelCard.load(student / "README.md").data.license == "apache-2.0"


def test_card_that_is_not_ours_is_kept(student, tmp_path):
    report = write_report(tmp_path / "report", student)
    (student / "README.md").write_text("# Mine")
    assert_one_message(run_cli("card", student, "--report", report), 2, "hf-gqa did not make it", "--overwrite")
    assert (student / "README.md").read_text() == "# Mine" and not (student / "evaluation").exists()
    assert run_cli("card", student, "--report", report, "--output", tmp_path / "card.md").exit_code == 0
    assert not (student / "evaluation").exists()
    assert run_cli("card", student, "--report", report, "--overwrite").exit_code == 0


def test_report_of_another_version_is_refused(student, tmp_path):
    report = write_report(tmp_path / "report", student)
    text = (report / "report.json").read_text().replace('"format": 1', '"format": 99', 1)
    (report / "report.json").write_text(text)
    assert_one_message(run_cli("card", student, "--report", report), 2, "format = 99")
    assert_one_message(run_cli("card", student), 2, "no such report")


def test_own_card_is_clean(student):
    report = report_of(student)
    text = str(make_card(report, student))
    assert lint_card(text, report, student) == lint_card(text, report) == []
    assert lint_card(text.replace("\n", "\r\n"), report, student) == []
    assert lint_card(text.replace("## Limits", "Trained by me in 3 weeks.\n\n## Limits"), report, student) == []


def unnoticed_mutations(text: str, report) -> list[str]:
    """The last digit of each number of the card in turn is changed; what the lint lets pass."""
    found = list(re.finditer(r"\d+", text))
    assert len(found) > 100
    digits = [(match.end() - 1, (int(match[0][-1]) + 1) % 10) for match in found]
    return [
        text[at - 30 : at + 10] for at, digit in digits if not lint_card(f"{text[:at]}{digit}{text[at + 1 :]}", report)
    ]


def test_every_mutated_number_is_noticed(student, monkeypatch):
    """In metadata, sentences, tables and recipe; one row of each table."""
    report = report_of(student)
    fields = ("by_context", "retrieval", "tasks", "speed", "capacity", "notes")
    report = replace(report, **{name: getattr(report, name)[:1] for name in fields})
    text = str(make_card(report, student))
    monkeypatch.setattr(card_lint, "card_of", cache(card_lint.card_of))
    assert unnoticed_mutations(text, report) == []


def cache(make):
    """A card is made once for each name and donor, which is most of a lint's time."""
    made = {}

    def remembered(report, *, name, base_model, licence):
        key = name, base_model, licence
        if key not in made:
            made[key] = make(report, name=name, base_model=base_model, licence=licence)
        return made[key]

    return remembered


@pytest.mark.slow
def test_every_mutated_number_of_a_whole_card_is_noticed(student):
    report = report_of(student)
    assert unnoticed_mutations(str(make_card(report, student)), report) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("| 24.05 |", "| 23.05 |"), "altered, the report says: | perplexity | 22.2 | 24.05"),
        (lambda text: re.sub(r"^\| perplexity.*\n", "", text, flags=re.M), "left out, the report says: | perplexity"),
        (
            lambda text: text.replace("| perplexity", "| accuracy | 99 | 99 | 1 |\n| perplexity"),
            "not in the report: | acc",
        ),
        (lambda text: text.replace("base_model: donor\n", ""), "base_model is missing"),
        (lambda text: text.replace("relation: finetune", "relation: quantized"), "base_model_relation is quantized"),
        (lambda text: text.replace("license: other", "license: mit"), "license is mit, the student carries other"),
        (lambda text: re.sub(r"^license.*\n", "", text, flags=re.M), "license is None, the student carries other"),
        (lambda text: text.replace("# student\n", "# {{ title }}\n"), "a placeholder is left: {{ title }}"),
        (lambda text: text.replace("## Limits", "## Limits\n\n[More Information Needed]"), "a placeholder is left"),
        (lambda text: re.sub(r"SHA-256 is `\w+`", "SHA-256 is `00`", text), "is of the report with SHA-256 00"),
        (lambda text: re.sub(r".*SHA-256 is.*", "", text), "names no report"),
        (lambda text: text.replace("value: 24.0468", "value: 20.0"), "is 20.0, the report says 24.0468"),
        (lambda text: re.sub(r"model-index:.*?\n---", "---", text, count=1, flags=re.S), "the report says 24.0468"),
        (lambda text: "# No metadata, no numbers", "names no report"),
        (lambda text: TEMPLATE.read_text(), "the metadata cannot be read"),
        (lambda text: text.replace("model-index:", "model-index: [\n"), "the metadata cannot be read"),
    ],
)
def test_problems_are_found_where_they_are(student, change, words):
    report = report_of(student)
    text = str(make_card(report, student))
    changed = change(text)
    assert changed != text
    problems = lint_card(changed, report, student)
    assert [problem for problem in problems if words in problem], problems
    assert all(re.match(r"\d+: ", problem) for problem in problems)


def test_line_of_an_altered_number_is_said(student):
    report = report_of(student)
    text = str(make_card(report, student)).replace("| 24.05 |", "| 23.05 |")
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "23.05" in line)
    assert [problem.partition(":")[0] for problem in lint_card(text, report, student)] == [str(line)]


def test_card_of_an_older_report_is_noticed(student):
    report = report_of(student)
    text = str(make_card(report, student))
    newer = replace(report, kl_nats_per_token=0.0913)
    assert any("is of the report with SHA-256" in problem for problem in lint_card(text, newer, student))


def test_check_command_fails_with_the_problems(student, tmp_path):
    report = write_report(tmp_path / "report", student)
    run_cli("card", student, "--report", report)
    card = student / "README.md"
    card.write_text(card.read_text().replace("| 24.05 |", "| 23.05 |"))
    result = run_cli("card", student, "--check")
    assert result.exit_code == 1 and "README.md:" in result.stdout and "24.05" in result.stdout
    found = json.loads(run_cli("card", student, "--check", "--json").stdout)
    assert len(found["problems"]) == 1
    card.unlink()
    assert_one_message(run_cli("card", student, "--check"), 2, "no such card")


def test_hostile_names_do_nothing(student, tmp_path):
    base = report_of(student)
    report = replace(
        base,
        donor=replace(base.donor, name=HOSTILE),
        text=replace(base.text, sources=(HOSTILE,)),
        tasks=tuple(replace(row, task=HOSTILE, metric=HOSTILE) for row in base.tasks),
        retrieval=tuple(replace(row, task=HOSTILE) for row in base.retrieval),
        settings=replace(base.settings, device_name=HOSTILE, versions={HOSTILE: HOSTILE}),
        conversion=base.conversion | {"donor": base.conversion["donor"] | {"name": HOSTILE}},
        recipe={"donor": HOSTILE, HOSTILE: "```\n# out"},
        command=f"hf-gqa evaluate '{HOSTILE}'\n```\n# out",
        notes=(HOSTILE, "- 1. x", "1. x"),
    )
    text = str(card_of(report, name=HOSTILE, base_model="donor", licence=find_licence(student)))
    data = ModelCard(text).data
    assert data.base_model == "donor" and data.model_name == " ".join(HOSTILE.split())
    assert lint_card(text, report) == []
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    plain_card = MarkdownIt("commonmark").enable("table").render(make_card(base, student).text)
    assert "<script" not in html and "<img" not in html and "<hr" not in html and "<a " not in html
    for tag in ("<h1>", "<h2>", "<table>", "<tr>", "<td", "<pre>"):
        assert html.count(tag) == plain_card.count(tag), tag
    assert html.count("<li>") == plain_card.count("<li>") + 1  # three notes for two


def test_donor_name_that_no_repository_may_have(student):
    base = report_of(student)
    for name, expected in {
        "a|b": "a-b",
        "/home/x/my donor": "my-donor",
        "someone/donor": "someone/donor",
        "///": "donor",
    }.items():
        report = replace(base, conversion=base.conversion | {"donor": base.conversion["donor"] | {"name": name}})
        assert model_card.donor_repository(report) == expected
    with pytest.raises(Refusal, match=r"base_model 'a b': not the name"):
        make_card(base, student, base_model="a b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b", r"a\_b"),
        ("# x", r"\# x"),
        ("1. x", r"1\. x"),
        ("2.13.0", "2.13.0"),
        ("a\nb", "a b"),
        ("<b>&", r"\<b\>\&"),
    ],
)
def test_plain(text, expected):
    assert plain(text) == expected


def test_code_and_block_have_longer_fences_than_what_they_hold():
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a|b") == r"`a\|b`"
    assert block("x\n````\ny").splitlines()[0] == "`````"


@pytest.mark.parametrize(
    ("value", "words"), [(24.0468, "24.05"), (12288, "12,288"), (0.0, "0"), (1e-7, "1e-07"), (3.0, "3")]
)
def test_number(value, words):
    assert number(value) == words


def test_sections_without_numbers_have_no_table():
    assert set(tables(sample_report(tasks=(), speed=()))) == {"quality", "by_context", "cache", "capacity", "retrieval"}


def test_context_that_is_never_too_long():
    capacity = replace(sample_report().capacity[0], student_context_tokens=None)
    assert "| 1 GiB | 1 | 85,753 | any |" in tables(sample_report(capacity=(capacity,)))["capacity"]


@pytest.mark.skipif(not (REPOSITORY / "model_cards").is_dir(), reason="the tests run without the checkout")
def test_template_is_the_one_that_is_filled():
    assert (REPOSITORY / "model_cards/template.md").resolve() == TEMPLATE.resolve()
