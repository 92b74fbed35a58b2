"""The rules of the house as tests: who may import whom, what is never called, what importing the package leaves alone."""

import ast
import inspect
import shutil
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import hf_gqa

from .fresh_process import TESTS, run_python
from .house_floors import FILES, PACKAGE, breaches, imports_of, name_of, short


SHIPPED_MAY_IMPORT = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 40


def test_imports_go_down():
    assert [breach for file in FILES for breach in breaches(name_of(file), file)] == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("runtime/layer_plan.py", "from ..refusal import Refusal"),
        ("runtime/layer_plan.py", "from .modeling_gqa_llama import GQALlamaConfig"),
        ("weights/checkpoint.py", "from ..methods import METHODS"),
        ("methods/first.py", "from .mean_pool import METHOD"),
        ("methods/first.py", "from ..sharing import SHARINGS"),
        ("methods/first.py", "import peft"),
        ("sharing/own.py", "def rows():\n    from .. import convert"),
        ("convert/plan.py", "from ..export import manifest"),
        ("convert/plan.py", "import hf_gqa.methods.first"),
        ("convert/target.py", "from .relatives.gpt2 import RELATIVE"),
        ("convert/target.py", "from .relatives import gpt2"),
        ("evaluate/__init__.py", "from hf_gqa.uptrain import callback"),
        ("evaluate/tasks/recall.py", "from ..retrieval.passkey import TASK"),
        ("evaluate/report/verdict.py", "from ..page.page import make_page"),
        ("evaluate/page/page.py", "from ..quality.bootstrap import Bootstrap"),
        ("evaluate/cost/speed.py", "from ..evaluation import evaluate"),
        ("evaluate/cost/speed.py", "from .. import evaluate"),
        ("export/verify.py", "from .. import __version__"),
        ("cli/convert.py", "import datasets"),
        ("registry.py", "from .convert.plan import ConversionPlan"),
    ],
)
def test_breach_is_noticed(monkeypatch, importer, line):
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: line)
    assert len(breaches(name_of(PACKAGE / importer), PACKAGE / importer)) == 1


def imported_test_modules(code: str) -> list[str]:
    """What two test modules share stands in a third that is none, so that neither runs for the other's sake."""
    parts = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            parts += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts += [part for alias in node.names for part in alias.name.split(".")]
    return [part for part in parts if (TESTS / f"{part}.py").is_file() and part.startswith("test_")]


def test_no_test_module_is_imported():
    found = {file.name: imported_test_modules(file.read_text(encoding="utf-8")) for file in TESTS.glob("*.py")}
    assert len(found) > 100 and {name: modules for name, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from .test_house_rules import FLOORS",
        "from . import covering, test_house_rules",
        "from tests.test_house_rules import FLOORS as floors",
        "import tests.test_house_rules as rules",
        "def late():\n    from tests import test_house_rules",
    ],
)
def test_imported_test_module_is_noticed(line):
    assert imported_test_modules(line) == ["test_house_rules"]


@pytest.mark.parametrize("file", sorted((PACKAGE / "runtime").glob("*.py")), ids=short)
def test_shipped_code_needs_nothing_but_transformers(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    siblings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"{short(file)}:{node.lineno}"
            assert node in tree.body and node.col_offset == 0, f"{short(file)}:{node.lineno}: not at line start"
            siblings.add(node.module)
    libraries = {name.partition(".")[0] for _, name in imports_of(file)} - {"hf_gqa"}
    assert libraries <= SHIPPED_MAY_IMPORT
    needed = {Path(path).stem for path in get_relative_import_files(file)}  # what save_pretrained copies
    assert siblings <= needed and all((PACKAGE / "runtime" / f"{name}.py").is_file() for name in needed)


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def forbidden_in(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, what) of everything that may execute what comes with a checkpoint, or that hands a shell a string."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [(node.lineno, name) for name in names if name in ("pickle", "dill", "cloudpickle", "joblib")]
        if isinstance(node, ast.Dict):
            named = {key.value: value for key, value in zip(node.keys, node.values, strict=True) if is_text(key)}
            found += [(node.lineno, name) for name in ("trust_remote_code",) if is_true(named.get(name))]
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            found += [
                (node.lineno, f"{name}=True")
                for name in ("trust_remote_code", "allow_pickle", "shell")
                if is_true(keywords.get(name))
            ]
            safe = called == "torch.load" and is_true(keywords.get("weights_only"))
            if called in ("torch.load", "yaml.load", "eval", "exec", "os.system", "numpy.load") and not safe:
                found.append((node.lineno, called))
    return found


def is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_nothing_is_executed_but_by_the_one_comparison():
    found = [
        (short(file), what) for file in FILES for _, what in forbidden_in(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == [("convert/donor.py", "trust_remote_code=True")]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(file)",
        "numpy.load(file)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, **{'trust_remote_code': True})",
        "eval(text)",
    ],
)
def test_forbidden_call_is_noticed(code):
    assert len(forbidden_in(ast.parse(code))) == 1


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without the docstring: saying what it does makes no function too long."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    said = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - said


def too_long_in(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    where = f"{file.parent.name}/{file.name}"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [f"{where}: {f.name}" for f in functions if code_lines(f) > MOST_LINES_OF_A_FUNCTION]
    return [where, *found] if len(text.splitlines()) > MOST_LINES else found


def test_files_and_functions_are_short():
    assert [name for file in (*FILES, *TESTS.glob("*.py")) for name in too_long_in(file)] == []


def test_modules_say_what_they_are_for():
    silent = [file for file in FILES if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert list(map(short, silent)) == []


@pytest.mark.parametrize("name", hf_gqa.__all__)
def test_public_name_has_a_docstring(name):
    text = inspect.getdoc(getattr(hf_gqa, name))
    assert text and not text.startswith(f"{name}(")  # which dataclasses write themselves


BEFORE_AND_AFTER = """
import importlib, json, os, signal, sys

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from transformers.generation import utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import configuration_auto, modeling_auto

FAMILIES = sys.argv[1:]


def native_modules():
    for family in FAMILIES:
        config = AutoConfig.for_model(family)
        name = type(config).__module__
        yield importlib.import_module(name)
        yield importlib.import_module(name.replace("configuration", "modeling"))


MODULES = [*native_modules(), torch.nn.functional, sdpa_attention, utils, transformers.cache_utils]
CLASSES = [c for m in MODULES for c in vars(m).values() if isinstance(c, type)]
CLASSES += [torch.nn.Module, torch.nn.Linear, torch.Tensor, GenerationMixin, AutoConfig, AutoModel, AutoModelForCausalLM]
MAPPINGS = {n: m for n, m in vars(modeling_auto).items() if hasattr(m, "_extra_content")}
MAPPINGS["CONFIG_MAPPING"] = configuration_auto.CONFIG_MAPPING


def state():
    found = {}
    for module in MODULES:
        found.update({f"{module.__name__}.{name}": id(value) for name, value in vars(module).items()})
    for c in CLASSES:
        found.update({f"{c.__module__}.{c.__qualname__}.{name}": id(value) for name, value in vars(c).items()})
    for label, functions in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        found.update({f"{label} {key}": id(functions[key]) for key in functions})
    for family in FAMILIES:
        config_class = configuration_auto.CONFIG_MAPPING[family]
        found[f"config {family}"] = id(config_class)
        for name, mapping in MAPPINGS.items():
            if name != "CONFIG_MAPPING" and config_class in mapping:
                found[f"{name} {family}"] = id(mapping[config_class])
    found.update({f"environment {name}": value for name, value in os.environ.items()})
    found["signal"] = str(signal.getsignal(signal.SIGTERM))
    found["dtype"], found["threads"] = str(torch.get_default_dtype()), torch.get_num_threads()
    found["verbosity"] = transformers.utils.logging.get_verbosity()
    return found


def registered():
    keys = {(name, key) for name, m in MAPPINGS.items() for key in m._extra_content}
    return {(name, key if isinstance(key, str) else key.__module__) for name, key in keys}


before, registered_before = state(), registered()
import hf_gqa

unasked = sorted(registered() - registered_before)
for family in FAMILIES:
    AutoConfig.for_model(f"gqa_{family}")
after = state()
changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
new = sorted(after.keys() - before.keys())
print(json.dumps({
    "changed": [name for name in changed if name not in new], "new": new,
    "compared": len(before), "unasked": unasked, "added": sorted(registered() - registered_before),
}))
"""


def test_importing_the_package_replaces_nothing():
    """Of all attention functions, native classes with their methods, and what AutoModel makes of native types.

    What is new is our attention function with its masks and our own model types, and nothing else.
    """
    families = [file.stem.removeprefix("modeling_gqa_") for file in (PACKAGE / "runtime").glob("modeling_gqa_*.py")]
    found = run_python(BEFORE_AND_AFTER, *families)
    assert found["changed"] == [] and found["compared"] > 1000
    assert found["new"] == ["attention grouped_sdpa", "mask grouped_sdpa"]
    assert found["unasked"] == [], "a family is loaded when it is asked for"
    own = {key for mapping, key in map(tuple, found["added"]) if mapping == "CONFIG_MAPPING"}
    assert own == {f"gqa_{family}" for family in families}
    modules = {key for mapping, key in map(tuple, found["added"]) if mapping != "CONFIG_MAPPING"}
    assert modules == {f"hf_gqa.runtime.modeling_gqa_{family}" for family in families}


NEW_PLUGINS = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_gqa
from hf_gqa.convert.families import FAMILIES
from hf_gqa.methods import METHODS
from tests.tiny_donors import tiny_donor

scratch = Path(sys.argv[1])
tiny_donor("arcee").save_pretrained(scratch / "donor")
logits = {}
for export in ("native", "bundle"):
    folder = scratch / export
    hf_gqa.convert_checkpoint(scratch / "donor", folder, num_key_value_heads=2, method="second", export=export)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits[export] = model(torch.arange(12).unsqueeze(0)).logits
KEY = "model.layers.1.self_attn.k_proj.weight"
heads = load_file(scratch / "donor/model.safetensors")[KEY].unflatten(0, (4, 8))
print(json.dumps({
    "package": hf_gqa.__file__,
    "registered": ["second" in METHODS.names(), "arcee" in FAMILIES.names()],
    "class": type(model).__name__,
    "same logits": torch.allclose(logits["native"], logits["bundle"], atol=1e-5),
    "second heads": torch.equal(load_file(scratch / "bundle/model.safetensors")[KEY], heads[1::2].flatten(0, 1)),
    "code": sorted(path.name for path in (scratch / "bundle").glob("*.py")),
}))
"""


@pytest.mark.slow
def test_new_method_and_new_family_are_one_new_file_each(tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "copy/hf_gqa", ignore=shutil.ignore_patterns("__pycache__"))
    method = (package / "methods/first.py").read_text(encoding="utf-8")
    assert "tensor_K[::members]" in method
    method = method.replace("tensor_K[::members]", "tensor_K[1::members]").replace("First", "Second")
    (package / "methods/second.py").write_text(method, encoding="utf-8")
    family = (package / "runtime/modeling_gqa_llama.py").read_text(encoding="utf-8")
    family = family.replace("Llama", "Arcee").replace("llama", "arcee")
    (package / "runtime/modeling_gqa_arcee.py").write_text(family, encoding="utf-8")
    found = run_python(NEW_PLUGINS, tmp_path, package=package, cwd=tmp_path)
    assert found.pop("package") == str(package / "__init__.py")
    assert "modeling_gqa_arcee.py" in found["code"] and len(found.pop("code")) > 3
    assert found.pop("class") == "GQAArceeForCausalLM"
    assert found == {"registered": [True, True], "same logits": True, "second heads": True}
