"""What units save of a budget: multiply-accumulates, parameters, or time of a denoiser call."""
from __future__ import annotations

import statistics
import time
from typing import Dict, List, Tuple

import torch
from torch import nn

from pruning.methods.moments import hooked
from pruning.methods.surgery import Group
from pruning.metrics import costs

TIMED = 5  # calls for the budget "time"


def prices(denoiser: nn.Module, groups: List[Group], arguments: dict, budget: str) -> Tuple[float, Dict[str, float]]:
    """Return the budget's total for a denoiser call, and what a unit of each group saves of it: group name -> price.

    A unit's rows and columns save their share of their layers, and a head its share of what else its attention does.
    """
    if budget == "parameters":
        return float(sum(parameter.numel() for parameter in denoiser.parameters())), {
            group.name: sum(own.numel() for _, _, own in group.owned()) / group.units for group in groups}
    measured = costs.module_macs(denoiser, arguments) if budget == "macs" else module_seconds(denoiser, arguments)
    names = {id(module): name for name, module in denoiser.named_modules()}
    found = {}
    for group in groups:
        layers = {id(layer): measured.get(names[id(layer)], 0.0) for layer in group.module.modules()
                  if isinstance(layer, (nn.Linear, nn.Conv2d))}
        price = 0.0
        for part in group.parts(scored=True):
            own = group.by_unit(part.layer.weight, part)
            price += layers[id(part.layer)] * own.numel() / part.layer.weight.numel()
        if group.kind.unit == "heads":
            price += max(measured.get(names[id(group.module)], 0.0) - sum(layers.values()), 0.0)
        found[group.name] = price / group.units
    return measured[""], found


def module_seconds(denoiser: nn.Module, arguments: dict) -> Dict[str, float]:
    """Return the median seconds of each module's calls in a call of the denoiser, by its name; "" is the denoiser."""
    started: Dict[str, float] = {}
    seconds: Dict[str, List[float]] = {}

    def begin(name):
        def note(_module, _inputs):
            costs.synchronize(next(denoiser.parameters()).device)
            started[name] = time.perf_counter()
        return note

    def end(name):
        def note(_module, _inputs, _output):
            costs.synchronize(next(denoiser.parameters()).device)
            seconds.setdefault(name, []).append(time.perf_counter() - started[name])
        return note

    watched = [(name, module) for name, module in denoiser.named_modules()
               if not name or isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "processor")]
    with torch.no_grad(), hooked([*(module.register_forward_pre_hook(begin(name)) for name, module in watched),
                                  *(module.register_forward_hook(end(name)) for name, module in watched)]):
        for _ in range(TIMED + 1):  # the first warms up
            denoiser(**arguments)
    return {name: statistics.median(times[len(times) // (TIMED + 1):]) * (len(times) // (TIMED + 1))
            for name, times in seconds.items()}
