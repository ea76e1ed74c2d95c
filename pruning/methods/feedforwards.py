"""Feed-forwards that no row of KINDS names, found by probing: a module is called, and what changes is watched.

A module is taken for a feed-forward if, called with one tensor, it calls each of its Linear or Conv2d layers once, the
last of them reads a hidden width, all others give that width or a multiple of it (gate and value), and for every unit
tried: other values for its own places change the last layer's input at this unit alone, and zeros there give the output
that a zero in this input gives. So removed equals masked, whatever the layers are called.
"""
from __future__ import annotations

import copy
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from pruning.methods.kinds import Kind
from pruning.methods.moments import hooked

CHANNELS = {nn.Linear: -1, nn.Conv2d: 1}  # the dimension of inputs and outputs along which units lie


def find(denoiser: nn.Module, known: List[nn.Module]) -> Dict[str, Kind]:
    """Return the feed-forwards inside lists of modules, by name, that lie neither around nor in a known module."""
    inside = {id(part) for module in known for part in module.modules()}
    found, kinds = {}, {}
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = {name: module for name, module in denoiser.named_modules()
                  if any(name.startswith(f"{blocks}.") for blocks in names)}
    for name in sorted(candidates, key=lambda name: -name.count(".")):  # the innermost first
        module = candidates[name]
        layers = layers_of(module)
        if len(layers) < 2 or any(id(part) in inside for part in module.modules()):
            continue
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        alike = (type(module), repr(module), repr(plain))  # modules that are alike are probed once
        if alike not in kinds:
            kinds[alike] = kind_of(module, layers)
        if kinds[alike]:
            found[name] = kinds[alike]
            inside |= {id(part) for part in module.modules()}
    return {name: found[name] for name in candidates if name in found}


def layers_of(module: nn.Module) -> Dict[str, nn.Module]:
    """Return the Linear or the Conv2d layers in a module, {} if it holds other weights of two dimensions or more."""
    for kind in CHANNELS:
        layers = {path: layer for path, layer in module.named_modules() if path and type(layer) is kind
                  and getattr(layer, "groups", 1) == 1}
        owned = {id(layer.weight) for layer in layers.values()}
        if layers and all(parameter.dim() < 2 or id(parameter) in owned for parameter in module.parameters()):
            return layers
    return {}


@torch.no_grad()
def kind_of(module: nn.Module, layers: Dict[str, nn.Module]) -> Optional[Kind]:
    """Return the row that describes a module if it is a feed-forward, None if it is none. See the top of the file.

    layers: see layers_of. On the meta device, only what shapes show is looked at.
    """
    x = random_input(next(iter(layers.values())))
    try:
        order = called(module, layers, x)
        column = order[-1]
        hidden = layers[column].weight.shape[1]
        if (len(order) != len(layers) or len(set(order)) < len(order)
                or any(len(layers[path].weight) % hidden for path in order[:-1])):
            return None
        kind = Kind("neurons", (type(module).__name__,), tuple(order[:-1]), (column,),
                    units=lambda module: module.get_submodule(column).weight.shape[1])
        apart = x.is_meta or all(is_apart(module, layers, order, x, unit) for unit in {0, hidden // 2, hidden - 1})
        return kind if apart and survives(module, kind, x) else None
    except Exception:  # each class fails in its own way on an input that is not its own
        return None


def random_input(layer: nn.Module) -> Tensor:
    """Return an input of a layer: three tokens, (1, 3, inputs), or a picture, (1, inputs, 3, 3)."""
    width = layer.weight.shape[1]
    shape = (1, 3, width) if isinstance(layer, nn.Linear) else (1, width, 3, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight)


def called(module: nn.Module, layers: Dict[str, nn.Module], x: Tensor) -> List[str]:
    """Return the paths of the layers in the order in which they are called."""
    order: List[str] = []
    with hooked(layer.register_forward_hook(lambda *_, path=path: order.append(path))
                for path, layer in layers.items()):
        if not isinstance(module(x), Tensor):
            raise TypeError("a feed-forward returns one tensor")
    return order


def is_apart(module: nn.Module, layers: Dict[str, nn.Module], order: List[str], x: Tensor, unit: int) -> bool:
    """Return whether a unit acts through its own place in the column alone. order: paths in the order of the calls."""
    *rows, column = (layers[path] for path in order)
    hidden, channels = column.weight.shape[1], CHANNELS[type(column)]
    own = torch.tensor([unit], device=x.device)
    others = torch.tensor([other for other in range(hidden) if other != unit], device=x.device)

    def run(value: Optional[float] = None, masked: bool = False) -> Tuple[Tensor, Tensor]:
        """Return the column's input and the module's output, with `value` in the unit's rows or zero in its column."""
        seen = []

        def change(_layer, _inputs, output):
            return output if value is None else output.index_fill(
                channels, torch.arange(unit, output.shape[channels], hidden, device=x.device), value)

        def watch(_layer, inputs):
            given = inputs[0].index_fill(channels, own, 0) if masked else inputs[0]
            seen.append(given)
            return (given, *inputs[1:])

        with hooked([*(row.register_forward_hook(change) for row in rows), column.register_forward_pre_hook(watch)]):
            output = module(x)
        return seen[0], output

    (dense, _), (other, _), (_, zeroed), (_, masked) = run(), run(1.5), run(0.0), run(masked=True)
    same = torch.equal(dense.index_select(channels, others), other.index_select(channels, others))
    return same and not torch.equal(dense, other) and torch.equal(zeroed, masked)


def survives(module: nn.Module, kind: Kind, x: Tensor) -> bool:
    """Return whether the module still runs without half of its units, tried on the meta device."""
    from pruning.methods import surgery  # here, because surgery finds groups with this file

    small = copy.deepcopy(module, {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()})
    group = surgery.Group("", small, kind, kind.units(small), 1)
    surgery.remove(group, list(range(0, group.units, 2)))
    return small(x.to("meta")).shape == module(x).shape
