"""The table of methods: options and their types, names of variants, and how a method is called."""
from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from pruning import UserError, cli, methods
from pruning.methods import (
    METHODS,
    PRUNING,
    Method,
    Option,
    Pruned,
    default_options,
    prune,
    units,
    variant_name,
    weights,
)
from pruning.methods.calibration import Calibration

ROOT = Path(__file__).resolve().parents[1]
EACH_METHOD = pytest.mark.parametrize("method", list(PRUNING))
OPTIONS = [(method, name) for method, entry in METHODS.items() for name in entry.options]


def denoiser():
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": Attention(16, heads=4, dim_head=4), "mlp": FeedForward(16)})


def state(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.fixture
def new_method(monkeypatch):
    """A method of the table whose report holds, in place of layers, what it was called with."""
    entry = Method("does nothing", "atoms", {"share": Option(0.5, float, "half"), "fast": Option(False, bool, "fast")})
    monkeypatch.setitem(METHODS, "new_method", entry)
    file = SimpleNamespace(prune=lambda denoiser, rate, **given: Pruned("atoms", 1, 0, 0, {}, {"rate": rate, **given}))
    monkeypatch.setitem(sys.modules, "pruning.methods.new_method", file)
    return entry


# ---- the table

def test_tables_load_without_torch():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport pruning.methods, pruning.methods.calibration\n" \
           "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_that_share_an_option_agree_on_its_type():
    types = {}
    for method, name in OPTIONS:
        types.setdefault(name, set()).add(METHODS[method].options[name].type)
    assert {name for name, found in types.items() if len(found) > 1} == set()
    assert METHODS["magnitude"].options["scope"] is METHODS["iterative"].options["scope"]
    assert METHODS["structured"].options["mask_only"] is METHODS["attention_heads"].options["mask_only"]


@pytest.mark.parametrize(("method", "name"), OPTIONS)
def test_an_option_reads_its_own_default_from_text(method, name):
    option = METHODS[method].options[name]
    if option.type is bool:
        assert cli.on_or_off("on" if option.default else "off") is option.default
    elif option.default is not None:
        assert option.type(str(option.default)) == option.default


@EACH_METHOD
def test_the_file_of_a_method_takes_exactly_the_options_of_the_table(method):
    parameters = inspect.signature(import_module(f"pruning.methods.{method}").prune).parameters
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    if parameters.get("options"):  # passed on to the function that all methods of a sort share
        shared = inspect.signature(units.prune if METHODS[method].removes else weights.prune_by_score).parameters
        keywords |= {name for name, parameter in shared.items() if parameter.kind is parameter.KEYWORD_ONLY}
        keywords -= {"round_to"} - set(METHODS[method].options)  # has a default
    assert list(parameters)[:2] == ["denoiser", "rate"]
    assert keywords == {"calibration", *METHODS[method].options} - {"calibration_images"} - (
        set() if METHODS[method].trains else {"recovery_steps"})


@pytest.mark.parametrize(("method", "name", "text", "message"), [
    ("magnitude", "scope", "globl", "unknown scope 'globl', did you mean 'global'? (one of: row, layer, global)"),
    ("iterative", "scope", "columns", "unknown scope 'columns' (one of: row, layer, global)"),
    ("wanda", "pattern", "2:5", "unknown pattern '2:5', did you mean '2:4'? (one of: 2:4, 4:8)"),
    ("structured", "round_to", "-1", "expected a whole number, 0 or more; got '-1'"),
    ("structured", "round_to", "2.5", "expected a whole number, 0 or more; got '2.5'"),
    ("iterative", "recovery_steps", "-1", "expected a whole number, 0 or more; got '-1'"),
])
def test_a_value_that_an_option_does_not_take_is_one_line_that_names_what_it_takes(method, name, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        METHODS[method].options[name].type(text)
    assert str(raised.value) == message


def test_defaults_come_from_the_table():
    assert default_options("iterative") == {"scope": "layer", "recovery_steps": 60, "calibration_images": 128}
    assert default_options("structured") == {
        "criterion": "loss", "allocation": "uniform", "refit": True, "mask_only": False, "round_to": 0,
        "recovery_steps": 0, "calibration_images": 32}
    with pytest.raises(UserError, match="did you mean 'magnitude'"):
        default_options("magnitud")


@pytest.mark.parametrize(("method", "options", "name"), [
    ("magnitude", {}, "magnitude"),
    ("magnitude", {"scope": "layer"}, "magnitude"),
    ("magnitude", {"scope": "global"}, "magnitude+scope=global"),
    ("structured", {"round_to": 8, "mask_only": True}, "structured+mask_only+round_to=8"),
    ("structured", {"mask_only": False, "round_to": 0}, "structured"),
    ("structured", {"refit": False, "criterion": "norm"}, "structured+criterion=norm+refit=off"),
    ("iterative", {"recovery_steps": 0, "scope": "global"}, "iterative+scope=global+recovery_steps=0"),
    ("iterative", {"recovery_steps": 60}, "iterative"),
    ("magnitude", {"scope": "a/b c:d+e=f"}, "magnitude+scope=a-b-c-d-e-f"),
    ("magnitude", {"new": 0.25, "scope": "global"}, "magnitude+scope=global+new=0.25"),
    ("magnitude", {"z": "layer", "../a": 1}, "magnitude+..-a=1+z=layer"),
    ("of_another_version", {"scope": "layer", "mask_only": False}, "of_another_version+mask_only=off+scope=layer"),
    ("of_another_version", {"fast": True, "file": None}, "of_another_version+fast+file=None"),
    ("of_another_version", {}, "of_another_version"),
])
def test_a_variant_is_named_by_its_method_and_by_the_options_that_differ(method, options, name):
    assert variant_name(method, options) == name


def test_an_option_that_is_on_by_default_is_named_if_it_is_off(monkeypatch):
    monkeypatch.setitem(METHODS, "new_method", Method("", "atoms", {"fast": Option(True, bool, "")}))
    assert variant_name("new_method", {"fast": False}) == "new_method+fast=off"
    assert variant_name("new_method", {"fast": True}) == "new_method"


# ---- calling a method

def called(rate, **options):
    """What the new method is called with."""
    return prune("new_method", nn.Linear(2, 2), rate, **options).layers


def test_a_new_method_is_an_entry_and_a_file_and_is_given_every_option(new_method):
    assert called(0.2) == {"rate": 0.2, "share": 0.5, "fast": False, "calibration": None}
    assert called(0.2, share=0.125, fast=True) == {"rate": 0.2, "share": 0.125, "fast": True, "calibration": None}


def test_only_a_method_that_needs_the_calibration_is_given_it(new_method, monkeypatch):
    calibration = Calibration(list, 0)
    assert called(0.2, calibration=calibration)["calibration"] is None
    monkeypatch.setitem(METHODS, "new_method", new_method._replace(
        needs=lambda options: ("calls",) if options["fast"] else ()))
    assert called(0.2, calibration=calibration)["calibration"] is None
    assert called(0.2, fast=True, calibration=calibration)["calibration"] is calibration
    assert called(0.0, fast=True)["calibration"] is None
    with pytest.raises(UserError, match="needs recorded calls"):
        called(0.2, fast=True)


def test_a_method_that_can_need_calibration_says_on_how_many_images():
    for method, entry in METHODS.items():
        wants = {name: "guided" if name == "allocation" else True if name == "refit" else 1 for name in
                 ("allocation", "refit", "recovery_steps") if name in entry.options}
        assert bool(methods.needs(method, wants)) == ("calibration_images" in entry.options)


@pytest.mark.parametrize(("method", "options"), [
    *((method, {}) for method in PRUNING if not methods.needs(method, {})), ("iterative", {"recovery_steps": 0})])
def test_what_a_method_reports_has_the_unit_of_the_table(method, options):
    pruned = prune(method, denoiser(), 0.5, **options)
    assert isinstance(pruned, Pruned)
    assert pruned.unit == METHODS[method].unit
    assert 0 < pruned.taken == pruned.asked == round(0.5 * pruned.total)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_the_range_is_refused_before_anything_else(rate):
    with pytest.raises(UserError, match=r"a pruning rate is in \[0, 1\); got"):
        prune("no such method", None, rate, no_such_option=1)


@pytest.mark.parametrize(("method", "options", "message"), [
    ("magnitud", {}, "unknown method 'magnitud', did you mean 'magnitude'"),
    ("magnitude", {"scop": "layer"}, "unknown option of magnitude 'scop', did you mean 'scope'"),
    ("structured", {"scope": "layer"}, "unknown option of structured 'scope'"),
    ("magnitude", {"scope": "globl"}, "scope: unknown scope 'globl', did you mean 'global'"),
    ("structured", {"round_to": -1}, "round_to: expected a whole number, 0 or more; got '-1'"),
    ("structured", {"round_to": 2.5}, "round_to: expected a whole number, 0 or more; got '2.5'"),
    ("iterative", {"recovery_steps": -1}, "recovery_steps: expected a whole number, 0 or more; got '-1'"),
    ("attention_heads", {"mask_only": "no"}, "mask_only: expected True or False; got 'no'"),
])
def test_a_wrong_method_option_or_value_is_refused_by_name_and_nothing_is_pruned(method, options, message):
    module = denoiser()
    with pytest.raises(UserError) as raised:
        prune(method, module, 0.5, **options)
    assert str(raised.value).startswith(message)
    assert torch.equal(state(module), state(denoiser()))


def test_a_value_of_a_plain_type_is_refused_with_the_name_of_its_option(new_method):
    with pytest.raises(UserError, match="^share: "):
        methods.prune("new_method", None, 0.5, share="much")


# ---- calibration

def test_a_calibration_records_once_and_only_if_asked(tmp_path):
    recorded = []

    def record():
        recorded.append(1)
        return [({"sample": torch.zeros(1)}, torch.ones(1))]

    calibration = Calibration(record, 3, checkpoint=tmp_path / "checkpoint")
    assert (calibration.seed, calibration.checkpoint, recorded) == (3, tmp_path / "checkpoint", [])
    assert calibration.calls is calibration.calls
    assert len(recorded) == 1
    assert Calibration(record, 3).checkpoint is None
