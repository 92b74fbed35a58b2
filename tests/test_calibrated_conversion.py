"""Methods that look at the donor with text: what is gathered, what is exact, and what is refused."""

import copy
import errno
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gqa import ConversionPlan, Refusal, convert, convert_checkpoint
from hf_gqa.convert import calibration
from hf_gqa.convert.calibration import Calibration, calibrate
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.families import load_family
from hf_gqa.convert.manifest import Manifest
from hf_gqa.convert.surgery import layer_heads
from hf_gqa.methods import METHODS, MethodContext
from hf_gqa.weights.head_statistics import HeadStatistics
from hf_gqa.weights.rotation import rotation_of

from .alike_donors import alike_donor, put, rows
from .command_line import assert_one_message, run_cli
from .conformance import assert_close_for_float32, every_decoder_storage, every_family, grouped_donor, logits_of
from .covering import each_value
from .tiny_donors import MODEL_TYPES, tiny_donor


DONOR = Path(__file__).parent.parent / "examples" / "donor"
TRUSTED = {"trust_remote_code": True}
NORMED = [name for name in MODEL_TYPES if load_family(name).donor_layout.query_norm]
PLAIN = sorted(set(MODEL_TYPES) - set(NORMED))
plain_family = pytest.mark.parametrize("model_type", PLAIN)


def rearranged(donor, name: str, groups: int, calibration: Calibration | None):
    """A copy of the donor after one method; its number of KV heads is the donor's."""
    changed, opened = copy.deepcopy(donor), donor_from_model(donor)
    for layer_idx, heads in layer_heads(opened):
        layer = MethodContext(
            layer_idx=layer_idx,
            num_key_value_heads=groups,
            seed=0,
            initializer_range=0.02,
            rotation=rotation_of(opened.layout, opened.config, opened.head_dim, layer_idx),
            head_norms=opened.layout.query_norm is not None,
            statistics=None if calibration is None else calibration.statistics[layer_idx],
        )
        put(changed, layer_idx, METHODS.get(name)(heads, layer))
    return changed


@every_family
def test_statistics_are_those_of_the_inputs(model_type):
    donor = grouped_donor(model_type)
    found = calibrate(donor_from_model(donor), donor, rows())
    layout, seen = donor_from_model(donor).layout, {}
    for layer_idx in range(donor.config.num_hidden_layers):
        attention = donor.base_model.get_submodule(layout.attention.format(layer_idx=layer_idx))
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, i=layer_idx: seen.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        donor(rows(), use_cache=False)
    for layer_idx, inputs in seen.items():
        flat = torch.nn.functional.pad(inputs.flatten(0, 1), (0, 1), value=1.0).double()
        statistics = found.statistics[layer_idx]
        torch.testing.assert_close(statistics.moment_FF, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.covariance_FF, torch.cov(flat.T, correction=0), rtol=1e-3, atol=1e-3)
        assert statistics.tokens == rows().numel()


@each_value(model_type=MODEL_TYPES, name=["group", "align"], known=[True, False], counts=[(4, 2), (2, 1)])
def test_rearranging_keeps_the_logits(model_type, name, known, counts):
    heads, groups = counts
    if name == "group" and load_family(model_type).donor_layout.head_positions == "always":
        pytest.skip("is refused")
    donor = grouped_donor(model_type, heads) if heads < 4 else tiny_donor(model_type)
    calibration = calibrate(donor_from_model(donor), donor, rows()) if known else None
    changed = rearranged(donor, name, groups, calibration)
    assert_close_for_float32(logits_of(changed), logits_of(donor))
    if name == "align":
        assert not all(map(torch.equal, changed.state_dict().values(), donor.state_dict().values()))


@each_value(model_type=PLAIN, groups=[2, 1], known=[True, False])
def test_fold_is_exact_where_heads_differ_by_what_it_can_undo(model_type, groups, known):
    donor = alike_donor(model_type, groups)
    expected, text = logits_of(donor), rows() if known else None
    largest = expected.abs().max()
    folded = convert(donor, num_key_value_heads=groups, method="fold", calibration=text)
    assert (logits_of(folded) - expected).abs().max() < 1e-4 * largest
    pooled = convert(donor, num_key_value_heads=groups, method="mean_pool")
    assert (logits_of(pooled) - expected).abs().max() > 1e-2 * largest


@pytest.mark.parametrize("model_type", [m for m in PLAIN if load_family(m).donor_layout.head_positions != "always"])
def test_grouping_finds_the_heads_that_belong_together(model_type):
    """Folding neighbours that do not is caught: the same fold without `group` is far off."""
    donor = alike_donor(model_type, 2, order=(0, 3, 1, 2))
    expected = logits_of(donor)
    largest = expected.abs().max()
    grouped = convert(donor, num_key_value_heads=2, method="group,fold", calibration=rows())
    assert (logits_of(grouped) - expected).abs().max() < 1e-4 * largest
    neighbours = convert(donor, num_key_value_heads=2, method="fold", calibration=rows())
    assert (logits_of(neighbours) - expected).abs().max() > 1e-2 * largest


@every_family
@pytest.mark.parametrize("method", ["mean_pool", "fold"])
def test_refitting_brings_the_student_nearer(model_type, method):
    if model_type in NORMED and method == "fold":
        pytest.skip("is refused")
    donor = tiny_donor(model_type)
    plan = {"num_key_value_heads": 2, "calibration": rows()}
    plain = convert(donor, method=method, **plan)
    fitted = convert(donor, method=f"{method},refit", **plan)
    with torch.no_grad():
        wanted, before, after = (
            model.base_model(rows(), use_cache=False).last_hidden_state for model in (donor, plain, fitted)
        )
    assert (after - wanted).square().mean() < (before - wanted).square().mean()


def test_refitting_what_is_exact_changes_little():
    donor = alike_donor("llama", 2)
    fitted = convert(donor, num_key_value_heads=2, method="fold,refit_queries,refit", calibration=rows())
    assert (logits_of(fitted) - logits_of(donor)).abs().max() < 1e-3 * logits_of(donor).abs().max()


def test_renormalising_restores_the_mean_norm():
    donor = tiny_donor("llama")
    student = convert(donor, num_key_value_heads=1, method="mean_pool,renormalise")
    wanted = donor.model.layers[0].self_attn.k_proj.weight.unflatten(0, (4, 8)).norm(dim=(1, 2)).mean()
    torch.testing.assert_close(student.model.layers[0].self_attn.k_proj.weight.norm(), wanted)


@every_decoder_storage
@pytest.mark.parametrize("method", ["group,align,mean_pool,renormalise,refit", "group,fold,refit_queries,refit"])
def test_a_plan_that_changes_nothing_changes_no_bit(model_type, method):
    donor = tiny_donor(model_type)
    student = convert(donor, num_key_value_heads=4, method=method, calibration=rows(), export="bundle")
    assert torch.equal(logits_of(student), logits_of(donor))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["group,align,mean_pool", "group,fold,refit_queries,refit"])
def test_in_memory_equals_on_disk(model_type, dtype, method, tmp_path):
    tiny_donor(model_type).to(dtype).save_pretrained(tmp_path / "donor", max_shard_size="10KB")
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    assert donor.dtype == dtype
    plan = {"num_key_value_heads": 2, "method": method}
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", calibration=rows(), **plan)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "student", **TRUSTED)
    found = convert(donor, calibration=rows(), **plan)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_saved_calibration_gives_the_same_student(tmp_path):
    donor = tiny_donor("llama")
    made = calibrate(donor_from_model(donor), donor, rows())
    made.write(tmp_path / "calibration.safetensors")
    read = Calibration.read(tmp_path / "calibration.safetensors")
    assert read.donor == made.donor and torch.equal(read.tokens_NL, made.tokens_NL)
    plan = {"num_key_value_heads": 2, "method": "group,fold,refit"}
    one, other = (convert(donor, calibration=each, **plan) for each in (read, rows()))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_failure_leaves_the_calibration_that_was_there(tmp_path, monkeypatch):
    """The disk is full after the first bytes."""
    donor, file = tiny_donor("llama"), tmp_path / "calibration.safetensors"
    made = calibrate(donor_from_model(donor), donor, rows())
    made.write(file)
    before = file.read_bytes()

    def fill(tensors, name, metadata):
        Path(name).write_bytes(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration, "save_file", fill)
    for where in (file, tmp_path / "new" / "calibration.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            made.write(where)
    assert file.read_bytes() == before and [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_without_text_nothing_is_known_of_the_inputs():
    statistics = HeadStatistics.unseen(3)
    assert statistics.tokens == 0
    assert torch.equal(statistics.covariance_FF, torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]).double()))


def test_calibration_of_another_donor_is_refused():
    donor, other = tiny_donor("llama"), tiny_donor("llama", seed=1)
    made = calibrate(donor_from_model(other), other, rows())
    with pytest.raises(Refusal) as refused:
        convert(donor, num_key_value_heads=2, method="fold", calibration=made)
    assert str(refused.value) == (
        "calibration: was made with another donor than 'LlamaForCausalLM', whose weights differ. Calibrate this one."
    )


def test_too_little_text_is_warned_of():
    with pytest.warns(UserWarning, match=re.escape("calibration: 24 tokens say little about 32 dimensions; ")):
        student = convert(tiny_donor("llama"), num_key_value_heads=2, method="fold,refit", calibration=rows()[:1])
    assert torch.isfinite(logits_of(student)).all()


@pytest.mark.parametrize("model_type", NORMED)
@pytest.mark.parametrize(("method", "name"), [("group,fold", "fold"), ("mean_pool,refit_queries", "refit_queries")])
def test_methods_that_need_linear_scores_refuse_normed_heads(model_type, method, name):
    with pytest.raises(Refusal) as refused:
        convert(tiny_donor(model_type), num_key_value_heads=2, method=method, calibration=rows())
    assert str(refused.value) == (
        f"method = {method}: '{name}' passes maps through queries and keys, which a {model_type} norms after their "
        f"projections. Use others: align, expand, first, group, mean_pool, random_init, refit, renormalise."
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(4), "calibration: got torch.float32 of shape [4]. Give rows of token ids, [rows, tokens]."),
        (
            torch.ones(1, 65, dtype=torch.long),
            "calibration: rows of 65 tokens are longer than max_position_embeddings = 64 of 'LlamaForCausalLM'. Give "
            "shorter rows.",
        ),
        (
            torch.tensor([[3, 99]]),
            "calibration: its token ids go from 3 to 99, those of 'LlamaForCausalLM' from 0 to 98. Use the donor's own "
            "tokenizer.",
        ),
    ],
)
def test_rows_that_are_none_of_the_donors_are_refused(tokens, message):
    with pytest.raises(Refusal) as refused:
        convert(tiny_donor("llama"), num_key_value_heads=2, method="fold", calibration=tokens)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kept.safetensors"], "--save-calibration: there is none. Give --calibration or --calibration-tokens."),
        (["kept.txt"], "--save-calibration kept.txt: a calibration is a .safetensors file. Give it such a name."),
    ],
)
def test_command_line_refuses_to_keep_what_is_none(arguments, message, tmp_path):
    result = run_cli("convert", DONOR, tmp_path / "out", "--num-key-value-heads", 2, "--save-calibration", *arguments)
    assert_one_message(result, 2, *message.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [lambda: tiny_donor("bloom"), lambda: tiny_donor("falcon", alibi=True)])
def test_heads_with_positions_of_their_own_stay_where_they_are(make):
    with pytest.raises(
        Refusal, match=r"method = group,mean_pool: 'group' moves heads, and each query head of .* Leave it"
    ):
        convert(make(), num_key_value_heads=2, method="group,mean_pool")


@pytest.mark.parametrize("name", ["refit", "refit_queries"])
def test_refitting_refuses_to_work_without_text(name):
    with pytest.raises(Refusal) as refused:
        convert(tiny_donor("llama"), num_key_value_heads=2, method=f"fold,{name}")
    assert str(refused.value) == (
        f"method = {name}: fits the student to what it computes on text, and there is none. Give --calibration or "
        f"--calibration-tokens (calibration= in Python)."
    )


@pytest.mark.parametrize("model_type", [m for m in PLAIN if load_family(m).donor_layout.plain_scores])
def test_refitted_queries_attend_where_the_donors_did(model_type):
    """In the first layer, whose inputs are the donor's: attention probabilities come nearer, and so does the output."""
    donor = tiny_donor(model_type)
    plan = {"num_key_value_heads": 1, "calibration": rows()}
    plain, fitted = (convert(donor, method=m, **plan) for m in ("fold", "fold,refit_queries"))
    errors = []
    for model in (donor, plain, fitted):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            errors.append(model(rows(), output_attentions=True, use_cache=False).attentions[0])
    wanted, before, after = errors

    def divergence(found):
        return (wanted * (wanted.clamp_min(1e-12).log() - found.clamp_min(1e-12).log())).sum(-1).mean()

    assert divergence(after) < divergence(before)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("fold,group", "method = fold,group: 'group' belongs before 'fold'. Put it there."),
        ("refit,fold", "method = refit,fold: 'refit' belongs after 'fold'. Put it there."),
        (
            "expand,refit",
            "method = expand,refit: 'refit' repairs what a reduction lost, and 'expand' loses nothing. Leave it out.",
        ),
    ],
)
def test_methods_in_an_order_without_sense_are_refused(method, message):
    with pytest.raises(Refusal) as refused:
        ConversionPlan(num_key_value_heads=2, method=method)
    assert str(refused.value) == message


def test_a_broken_calibration_is_refused(tmp_path):
    file = tmp_path / "calibration.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(Refusal, match=r"calibration\.safetensors: cannot be read \(.*\)\. Calibrate again\."):
        Calibration.read(file)


@pytest.mark.slow
@pytest.mark.parametrize("given", [["text"], []], ids=["text", "sampled"])
def test_command_line_calibrates(given, tmp_path):
    """On the embedded donor; a kept calibration gives the student that the text gave."""
    text, kept = tmp_path / "text.txt", tmp_path / "kept.safetensors"
    text.write_text("The cat sat on the mat, and the dog lay by the door. " * 400)
    common = ["--num-key-value-heads", "2", "--method", "group,fold,refit"]
    first = ["--calibration-tokens", "1024", *(["--calibration", str(text)] if given else [])]
    for output, more in (("one", [*first, "--save-calibration", str(kept)]), ("other", ["--calibration", str(kept)])):
        result = run_cli("convert", DONOR, tmp_path / output, *common, *more)
        assert result.exit_code == 0, result.output
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert Calibration.read(kept).tokens_NL.numel() == 1024
    recorded = [Manifest.read(tmp_path / name).calibration for name in ("one", "other")]
    assert recorded[0] == recorded[1] and recorded[0]["tokens"] == 1024
