"""Feed-forwards that no row of KINDS names, found by probing: a module is called, and what changes is watched.

A module is taken for a feed-forward if, called with one tensor, it calls each of its Linear layers once, the last of
them reads a hidden width, all others give that width or a multiple of it (gate and value), and for every unit tried:
other values for its own places change the last layer's input at this unit alone, and zeros there give the output that a
zero in this input gives. So removed equals masked, whatever the layers are called.
"""
from __future__ import annotations

import copy
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from pruning.methods.kinds import Kind
from pruning.methods.moments import hooked

TOKENS = 3


def find(denoiser: nn.Module, known: List[nn.Module]) -> Dict[str, Kind]:
    """Return the feed-forwards inside lists of modules, by name, that lie neither around nor in a known module."""
    inside = {id(part) for module in known for part in module.modules()}
    found, kinds = {}, {}
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = {name: module for name, module in denoiser.named_modules()
                  if any(name.startswith(f"{blocks}.") for blocks in names)}
    for name in sorted(candidates, key=lambda name: -name.count(".")):  # the innermost first
        module = candidates[name]
        layers = linear_layers(module)
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


def linear_layers(module: nn.Module) -> Dict[str, nn.Linear]:
    """Return the Linear layers in a module, {} if it holds other weights of two dimensions or more."""
    layers = {path: layer for path, layer in module.named_modules() if path and type(layer) is nn.Linear}
    owned = {id(layer.weight) for layer in layers.values()}
    return layers if all(p.dim() < 2 or id(p) in owned for p in module.parameters()) else {}


@torch.no_grad()
def kind_of(module: nn.Module, layers: Dict[str, nn.Linear]) -> Optional[Kind]:
    """Return the row that describes a module if it is a feed-forward, None if it is none. See the top of the file.

    layers: its Linear layers. On the meta device, only what shapes show is looked at.
    """
    x = random_input(module, next(iter(layers.values())).in_features)
    try:
        order = called(module, layers, x)
        column = order[-1]
        hidden = layers[column].in_features
        if (len(order) != len(layers) or len(set(order)) < len(order)
                or any(layers[path].out_features % hidden for path in order[:-1])):
            return None
        kind = Kind("neurons", (type(module).__name__,), tuple(order[:-1]), (column,),
                    units=lambda module: module.get_submodule(column).in_features)
        apart = x.is_meta or all(is_apart(module, layers, order, x, unit) for unit in {0, hidden // 2, hidden - 1})
        return kind if apart and survives(module, kind, x) else None
    except Exception:  # each class fails in its own way on an input that is not its own
        return None


def random_input(module: nn.Module, width: int) -> Tensor:
    """Return an input of a module, (1, TOKENS, width)."""
    parameter = next(module.parameters())
    x = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))
    return x.to(parameter.device, parameter.dtype)


def called(module: nn.Module, layers: Dict[str, nn.Linear], x: Tensor) -> List[str]:
    """Return the paths of the layers in the order in which they are called."""
    order: List[str] = []
    with hooked(layer.register_forward_hook(lambda *_, path=path: order.append(path))
                for path, layer in layers.items()):
        if not isinstance(module(x), Tensor):
            raise TypeError("a feed-forward returns one tensor")
    return order


def is_apart(module: nn.Module, layers: Dict[str, nn.Linear], order: List[str], x: Tensor, unit: int) -> bool:
    """Return whether a unit acts through its own place in the column alone. order: paths in the order of the calls."""
    column, hidden = layers[order[-1]], layers[order[-1]].in_features
    rows = [layers[path] for path in order[:-1]]
    others = torch.arange(hidden, device=x.device) != unit

    def run(value: Optional[float] = None, masked: bool = False) -> Tuple[Tensor, Tensor]:
        """Return the column's input and the module's output, with `value` in the unit's rows or zero in its column."""
        seen = []

        def change(_layer, _inputs, output):
            return output if value is None else output.index_fill(
                -1, torch.arange(unit, output.shape[-1], hidden, device=x.device), value)

        def watch(_layer, inputs):
            given = inputs[0].masked_fill(~others, 0) if masked else inputs[0]
            seen.append(given)
            return (given, *inputs[1:])

        with hooked([*(row.register_forward_hook(change) for row in rows), column.register_forward_pre_hook(watch)]):
            output = module(x)
        return seen[0], output

    (dense, _), (other, _), (_, zeroed), (_, masked) = run(), run(1.5), run(0.0), run(masked=True)
    return (torch.equal(dense[..., others], other[..., others]) and not torch.equal(dense, other)
            and torch.equal(zeroed, masked))


def survives(module: nn.Module, kind: Kind, x: Tensor) -> bool:
    """Return whether the module still runs without half of its units, tried on the meta device."""
    from pruning.methods import surgery  # here, because surgery finds groups with this file

    small = copy.deepcopy(module, {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()})
    group = surgery.Group("", small, kind, kind.units(small), 1)
    surgery.remove(group, list(range(0, group.units, 2)))
    return small(x.to("meta")).shape == x.shape[:-1] + (small.get_submodule(kind.columns[0]).out_features,)
