"""What can be reached of a denoiser: whether its weights are plain numbers, and which parameters a method leaves alone.

A quantised weight, an adapter or a weight that is computed from other tensors looks like the weight of a Linear and is
none: to zero or slice it changes nothing, or something else.
"""
from __future__ import annotations

import importlib
from typing import Callable, Dict, NamedTuple, Sequence, Tuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pruning import UserError
from pruning.methods import METHODS, PRUNING, Unreached, modulation, ranks, surgery
from pruning.methods.kinds import KINDS
from pruning.methods.zeroing import PRUNABLE, prunable_weights, why_not

VECTORS = "biases, norm weights and other vectors"


class Disguise(NamedTuple):
    """What a module may hold in place of plain weights."""

    shows: Callable[[nn.Module], bool]
    what: str
    remedy: str


def has_adapter(module: nn.Module) -> bool:
    """Return whether the module is an adapter around a layer, as peft makes of every layer that a LoRA changes."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def is_computed(module: nn.Module) -> bool:
    """Return whether a weight is made of others at each call: weight_orig, weight_g or a parametrization."""
    made = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    return parametrize.is_parametrized(module) or any(
        f"{name}_{source}" in module._parameters for name in made for source in ("orig", "g"))


def is_quantised(module: nn.Module) -> bool:
    """Return whether weights are kept in few bits: in a tensor of another class, as whole numbers, or packed."""
    packed = callable(getattr(type(module), "weight", None)) or hasattr(type(module), "qweight")
    return packed or "qweight" in module._buffers or any(
        type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor or not parameter.is_floating_point()
        for parameter in module._parameters.values() if parameter is not None)


def is_narrow(module: nn.Module) -> bool:
    """Return whether weights are kept in 8 bits, and cast to more at each call."""
    return any(parameter.element_size() == 1 for parameter in module._parameters.values() if parameter is not None)


DISGUISES = (
    Disguise(has_adapter, "carries an adapter, such as a LoRA",
             "call fuse_lora() and unload_lora_weights() on the pipeline, or only the latter, and save it"),
    Disguise(is_computed, "computes a weight from other tensors, as weight norm and masks of torch.nn.utils.prune do",
             "make the weight permanent, with prune.remove(), remove_weight_norm() or remove_parametrizations()"),
    Disguise(is_quantised, "holds quantised weights", "load the model without quantisation"),
    Disguise(is_narrow, "stores its weights in 8 bits", "load the model without layerwise casting"),
)


def check(denoiser: nn.Module) -> None:
    """Raise UserError that names the remedy if weights of the denoiser are not plain numbers."""
    for disguise in DISGUISES:
        names = [name for name, module in denoiser.named_modules() if disguise.shows(module)]
        if names:
            more = f" (one of {len(names)} such modules)" if len(names) > 1 else ""
            raise UserError(f"{names[0] or type(denoiser).__name__}{more} {disguise.what}, so pruning would miss what "
                            f"it computes; {disguise.remedy}")


def parameters(denoiser: nn.Module, removes: bool, units: Sequence[str] = ()) -> Dict[str, Unreached]:
    """Return every parameter by name, how many numbers it holds, and what it is to a method that does not reach it.

    A shared parameter counts once. removes: whether the method takes units out. units: those that it takes.
    """
    owned = others_units(denoiser, units) if removes else {}
    found = {}
    for name, parameter in denoiser.named_parameters():
        module, _, own = name.rpartition(".")
        why = owned.get(id(parameter)) or reason(denoiser.get_submodule(module), own, parameter)
        found[name] = Unreached(parameter.numel(), why)
    return found


def others_units(denoiser: nn.Module, units: Sequence[str]) -> Dict[int, str]:
    """Return which other units own a part of each parameter: id of the parameter -> their name."""
    modulated = {id(layer.weight): "ranks of AdaLN layers" for layer in ranks.modulation_layers(denoiser).values()}
    groups, _ = surgery.find_groups(denoiser, dict.fromkeys(kind.unit for kind in KINDS if kind.unit not in units))
    return {**modulated, **{id(own): group.kind.unit for group in groups for own, _, _ in group.owned()}}


def by_method(denoiser: nn.Module) -> Dict[str, Dict[str, int]]:
    """Return how many numbers of each parameter each method can remove or zero, by the name of the method.

    {} stands for a method that can do nothing here. Works on the meta device. Blocks are left out, as only a call of
    the denoiser shows which can be bypassed.
    """
    weights = {name: weight.numel() for name, weight in prunable_weights(denoiser).items()}
    found = {}
    for method in PRUNING:
        if not METHODS[method].removes:
            found[method] = weights
        elif method == "modulation":
            found[method] = modulation.reached(ranks.modulation_layers(denoiser))
        elif method != "blocks":
            units = importlib.import_module(f"pruning.methods.{method}").UNITS
            found[method] = surgery.reached(denoiser, surgery.find_groups(denoiser, units)[0])
    return found


def by_units(denoiser: nn.Module) -> Tuple[Dict[str, int], Dict[str, Unreached]]:
    """Return how many numbers of each parameter units and ranks hold, and what is left of each and why.

    Works on the meta device.
    """
    groups, skipped = surgery.survey(denoiser, *surgery.UNITS)
    reached = {**surgery.reached(denoiser, groups), **modulation.reached(ranks.modulation_layers(denoiser))}
    return reached, unreached(parameters(denoiser, removes=True), reached, skipped)


def reason(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """Return what a parameter is, if no method takes a part of it."""
    if parameter.dim() < 2:
        return VECTORS
    return "layers without units" if isinstance(module, PRUNABLE) else why_not(module, name)


def unreached(before: Dict[str, Unreached], reached: Dict[str, int], skipped: Dict[str, str]) -> Dict[str, Unreached]:
    """Return what is left of each parameter and why.

    before: see `parameters`. reached: how many numbers of a parameter the method can remove or zero, by name. skipped:
    modules or parameters that it would prune if it could: name -> why.
    """
    if not reached:  # nothing was counted
        return {}
    found = {}
    for name, whole in before.items():
        left = whole.parameters - reached.get(name, 0)
        if left:
            why = next((why for module, why in skipped.items() if f"{name}.".startswith(f"{module}.")), whole.why)
            found[name] = Unreached(left, why)
    return found
