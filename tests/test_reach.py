"""What a method can reach: weights that are not what they seem are refused, and all other parameters are counted."""
from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from diffusers import SanaTransformer2DModel, SD3Transformer2DModel
from test_surgery import FAMILIES, NEEDS_TORCH_25, SANA, SD3, UNITS, build, call_of, parameters
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from pruning import UserError, methods
from pruning.methods import PRUNING, bypass, surgery, unreached_by_reason, zeroing

COUNTED = ("magnitude", "structured", "attention_heads", "modulation")  # those that count in ways of their own


# ---- weights that are not what they seem

def a_layer(model):
    return model.transformer_blocks[0].attn.to_q


def quanto(model, freeze):
    found = pytest.importorskip("optimum.quanto")
    found.quantize(model, weights=found.qint8)
    if freeze:
        found.freeze(model)


def torchao(model):
    found = pytest.importorskip("torchao.quantization")
    found.quantize_(model, found.Int8WeightOnlyConfig())


def bitsandbytes(model, kind):
    found = pytest.importorskip("bitsandbytes")
    model.transformer_blocks[0].attn.to_q = getattr(found.nn, kind)(32, 32)


def lora(model):
    model.add_adapter(pytest.importorskip("peft").LoraConfig(r=2, target_modules=["to_q"]))


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names the successor
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


class OddParameter(nn.Parameter):
    """As bitsandbytes, torchao and diffusers' GGUF have them."""


class Adapted(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.ModuleDict({"default": nn.Linear(32, 2)})


def another_parameter(model):
    a_layer(model).weight = OddParameter(torch.zeros(32, 32))


def whole_numbers(model):
    a_layer(model).weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)


def adapted(model):
    model.transformer_blocks[0].attn.to_q = Adapted(a_layer(model))


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names the successor
        weight_norm(a_layer(model))


DISGUISES = {
    "quanto, frozen": (lambda model: quanto(model, True), "without quantisation"),
    "quanto, not frozen": (lambda model: quanto(model, False), "without quantisation"),
    "torchao": (torchao, "without quantisation"),
    "bitsandbytes, 8 bits": (lambda model: bitsandbytes(model, "Linear8bitLt"), "without quantisation"),
    "bitsandbytes, 4 bits": (lambda model: bitsandbytes(model, "Linear4bit"), "without quantisation"),
    "quantize_dynamic": (dynamic, "without quantisation"),
    "a class of Parameters": (another_parameter, "without quantisation"),
    "whole numbers": (whole_numbers, "without quantisation"),
    "layerwise casting": (lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
                          "without layerwise casting"),
    "LoRA": (lora, r"fuse_lora\(\) and unload_lora_weights\(\)"),
    "an adapter": (adapted, r"fuse_lora\(\) and unload_lora_weights\(\)"),
    "weight norm": (old_weight_norm, r"remove_weight_norm\(\)"),
    "a parametrization": (lambda model: parametrizations.weight_norm(a_layer(model)), r"remove_parametrizations\(\)"),
    "a mask of torch.prune": (lambda model: prune.l1_unstructured(a_layer(model), "weight", 0.5), r"prune\.remove\(\)"),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_weights_that_are_not_plain_numbers_are_refused_by_every_method_with_the_remedy(disguise):
    model = SD3Transformer2DModel(**dict(SD3, num_layers=1)).eval()
    change, remedy = DISGUISES[disguise]
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if type(tensor) is torch.Tensor}
    for method in PRUNING:
        options = {"criterion": "norm", "refit": False} if method in UNITS else {}
        for rate in (0.0, 0.5):
            if rate and methods.needs(method, options):
                continue  # is refused without calls before
            with pytest.raises(UserError, match=remedy) as raised:
                methods.prune(method, model, rate, **options)
            assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=remedy):
        methods.check_weights(model)
    assert all(torch.equal(model.state_dict()[name].float(), tensor.float()) for name, tensor in before.items())


@FAMILIES
def test_the_weights_of_every_family_are_plain(family):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        methods.check_weights(build(family).to(dtype))


# ---- what a method reaches

def owned_by_units(dense, units):
    """How many numbers of each parameter these units own, counted by zeroing all of them in a model of ones."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    for group in surgery.find_groups(model, units)[0]:
        surgery.mask(group, [])
    return {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters()}


@FAMILIES
@pytest.mark.parametrize("method", COUNTED)
def test_reached_and_unreached_parameters_are_all_parameters(family, method):
    model = build(family)
    options = {"criterion": "norm", "refit": False} if method in UNITS else {}
    if method == "modulation" and family in ("sd15", "sdxl", "scale_shift"):
        pytest.skip("UNets have no AdaLN")
    done = methods.prune(method, model, 0.0, **options)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    left = {name: each.parameters for name, each in done.unreached.items()}
    assert {name: done.reached.get(name, 0) + left.get(name, 0) for name in sizes} == sizes
    assert sum(unreached_by_reason(done.unreached).values()) == parameters(model) - sum(done.reached.values())
    if method in UNITS:
        expected = owned_by_units(model, UNITS[method])
    elif method == "modulation":
        expected = {name: size for name, size in sizes.items()
                    if re.search(r"(norm\w*|time_embed|adaln_single)\.linear\.weight", name)}
    else:
        expected = {f"{name}.weight": module.weight.numel() for name, module in model.named_modules()
                    if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert {name: size for name, size in expected.items() if size} == done.reached


@FAMILIES
def test_the_parameters_of_blocks_are_those_that_go_with_them(family):
    model = build(family)
    found = bypass.find(model, call_of(model))
    reached, before = bypass.reached(model, found), parameters(model)
    bypass.replace(model, found)
    assert sum(reached.values()) == before - parameters(model) > 0


def test_a_parameter_that_is_no_weight_of_a_layer_is_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.layer = nn.Parameter(torch.ones(2, 3, 4)), nn.Linear(4, 4)

    done = methods.prune("magnitude", nn.ModuleDict({"experts": Experts()}), 0.5)
    assert done.skipped_modules == {"experts.gate_up": "gate_up of Experts is not the weight of a layer"}
    assert unreached_by_reason(done.unreached) == {"gate_up of Experts is not the weight of a layer": 24,
                                         "biases, norm weights and other vectors": 4}


def test_layers_that_cannot_have_a_pattern_are_not_reached():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8))
    done = methods.prune("magnitude", model, 0.5, pattern="2:4")
    assert done.reached == {"1.weight": 64}
    assert done.unreached["0.weight"] == (24, "3 input channels are no multiple of 4")
    assert zeroing.count_zeros(model[0].weight) == 0


@pytest.mark.parametrize("family", ["sd15", "sd35", pytest.param("flux_dev", marks=NEEDS_TORCH_25)])
def test_what_another_method_reaches_is_said(family):
    done = methods.prune("attention_heads", build(family), 0.0, criterion="norm", refit=False)
    why = unreached_by_reason(done.unreached)
    assert {"neurons", "layers without units", "biases, norm weights and other vectors"} <= set(why)
    assert ("channels" in why, "ranks of AdaLN layers" in why) == (family == "sd15", family != "sd15")


@NEEDS_TORCH_25
@pytest.mark.parametrize(("method", "other"), [("structured", "heads"), ("attention_heads", "neurons")])
def test_a_layer_that_two_sorts_of_units_share_is_the_others_where_a_method_does_not_reach(method, other):
    done = methods.prune(method, build("flux_dev"), 0.0, criterion="norm", refit=False)
    name = "single_transformer_blocks.0.proj_out.weight"
    assert done.unreached[name] == (64 * (64 if other == "heads" else 256), other)


# ---- removal that is not exact

def test_a_norm_across_heads_is_told():
    model = SanaTransformer2DModel(**SANA, qk_norm="rms_norm_across_heads")
    options = {"criterion": "norm", "refit": False}
    for mask_only in (True, False):
        done = methods.prune("attention_heads", copy.deepcopy(model), 0.5, mask_only=mask_only, **options)
        assert list(done.inexact) == [f"transformer_blocks.{n}.attn{m}" for n in range(2) for m in (1, 2)]
        assert done.inexact["transformer_blocks.0.attn1"].startswith("its norm_q and norm_k run across all heads")
    assert methods.prune("structured", model, 0.5, **options).inexact == {}


@FAMILIES
@pytest.mark.parametrize("method", list(UNITS))
def test_where_removed_equals_masked_nothing_is_told(family, method):
    assert methods.prune(method, build(family), 0.0, criterion="norm", refit=False).inexact == {}
