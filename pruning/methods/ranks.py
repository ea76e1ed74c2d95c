"""Linear layers of low rank that share what they read of an equal input: find, replace, replay.

y = U (V x + c) + b in place of y = W x + b. V and c are held by the first layer of those that share them.
"""
from __future__ import annotations

import re
from collections import Counter
from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from pruning import UserError

# A layer that makes scale, shift and gate of an embedding of time, guidance and pooled text (AdaLN) is one of LAYERS in
# a module whose class name has this pattern, or ends a Sequential, or is itself, whose own name ends in NAMES.
MODULATED, LAYERS = re.compile("Ada[A-Z]|NormZero|Modulation"), ("linear", "lin", "out_layer")
NAMES = ("_mod", "modulation")


class LowRank(nn.Module):
    """A Linear layer of low rank. Input (..., inputs), output (..., outputs).

    down: reads the input, (rank, inputs) with a bias. shared: another layer holds `down`, and this one only uses it.
    """

    def __init__(self, down: nn.Linear, outputs: int, bias: bool, shared: bool):
        super().__init__()
        self.in_features, self.out_features = down.in_features, outputs
        self.up = nn.Linear(down.out_features, outputs, bias=bias, device=down.weight.device, dtype=down.weight.dtype)
        if not shared:
            self.down = down
        self.__dict__["reads"] = down  # not registered, so that weights are saved and counted once

    def forward(self, x: Tensor) -> Tensor:
        """Return U (V x + c) + b."""
        return self.up(self.reads(x))


def modulation_layers(denoiser: nn.Module) -> Dict[str, nn.Linear]:
    """Return the AdaLN layers by name; shared weights are left out."""
    found = {}
    for name, module in denoiser.named_modules():
        paths = LAYERS if MODULATED.search(type(module).__name__) else ()
        if isinstance(module, nn.Sequential) and name.endswith(NAMES):
            paths = (str(len(module) - 1),)
        found.update({f"{name}.{path}".lstrip("."): getattr(module, path) for path in paths if hasattr(module, path)})
        if name.endswith(NAMES):
            found[name] = module
    found = {name: layer for name, layer in found.items() if type(layer) is nn.Linear}
    owners = Counter(id(parameter) for layer in denoiser.modules() for parameter in layer._parameters.values())
    return {name: layer for name, layer in found.items()
            if all(owners[id(parameter)] == 1 for parameter in layer.parameters())}


@torch.no_grad()
def replace(denoiser: nn.Module, names: Sequence[str], rank: int) -> List[LowRank]:
    """Put layers of low rank, whose weights are yet to be set, in place of Linear layers, and note the removal.

    The layers of `names` share what they read. Works on the meta device too. Raises UserError if a layer is missing,
    has other inputs than the first, or no fewer than `rank`.
    """
    layers, down, made = modulation_layers(denoiser), None, []
    for name in names:
        layer = layers.get(name)
        if layer is None:
            raise UserError(f"{type(denoiser).__name__} has no {name} to take ranks out of")
        if not 1 <= rank < layer.in_features or down is not None and layer.in_features != down.in_features:
            raise UserError(f"{name} has {layer.in_features} inputs and cannot have rank {rank} with {names[0]}")
        weight = layer.weight
        shared = down is not None
        down = down or nn.Linear(layer.in_features, rank, device=weight.device, dtype=weight.dtype)
        new = LowRank(down, layer.out_features, layer.bias is not None, shared).train(layer.training)
        new.requires_grad_(weight.requires_grad)
        parent, _, own = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), own, new)
        made.append(new)
    plan = {f"{name}.ranks": list(range(rank)) for name in names}
    denoiser.removals = [*getattr(denoiser, "removals", []), plan]
    return made


def replay(denoiser: nn.Module, plan: Dict[str, list]) -> None:
    """Replace layers as a plan of `removals` says. Raises UserError if the plan does not fit the denoiser."""
    ranks: List[Optional[list]] = list(plan.values())
    if any(keep != list(range(len(keep))) for keep in ranks) or any(keep != ranks[0] for keep in ranks):
        raise UserError("ranks kept must be 0, 1, ... and equally many in all layers that share what they read")
    replace(denoiser, [name.rpartition(".")[0] for name in plan], len(ranks[0]))
