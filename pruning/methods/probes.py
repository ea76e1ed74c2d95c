"""Probes: what a change of a layer's output does to the guided output of the denoiser, for all layers at once.

With y the guided output and δ the change of a layer's output, the change of y is J δ to first order. For random signs
v, E[(vᵀ J δ)²] = ‖J δ‖² (Hutchinson, 1989). vᵀ J is the gradient of vᵀ y at the layer's output, and one backward gives
the gradients of all layers. So a few backwards replace one forward a layer.
"""
from __future__ import annotations

from typing import Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import UserError
from pruning.methods.calibration import Call, answer
from pruning.methods.moments import seed_of

PROBES = 4  # backwards a call, each with signs of its own
CALLS = 8  # calls that are probed


def probed_calls(calls: Sequence[Call], count: int = CALLS) -> List[Call]:
    """Return `count` of the calls. More are from the first half of sampling, whose errors reach all later steps."""
    noisiest_first = sorted(calls, key=lambda call: -float(torch.as_tensor(call[0].get("timestep", 0)).float().mean()))
    places = [round((len(calls) - 1) * (i / max(count - 1, 1)) ** 1.5) for i in range(min(count, len(calls)))]
    return [noisiest_first[place] for place in sorted(set(places))]


def guided(output: Tensor, guidance: Optional[float]) -> Tensor:
    """Return (1 − g) u + g c of a batch whose halves are unconditional and conditional; the output if g is None."""
    if guidance is None:
        return output
    unconditional, conditional = output.chunk(2)
    return (1 - guidance) * unconditional + guidance * conditional


def visit_gradients(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float],
                    layers: Dict[str, nn.Module], seed: int,
                    note: Callable[[str, nn.Module, Tensor, Tensor, int], None]) -> None:
    """Call note(name, layer, input, gradient, probe) for each layer and each probe of each call.

    gradient: of vᵀ y at the layer's output. probe: a number of its own for each backward. Weights get no gradients.
    Raises UserError if the denoiser's output is not finite.
    """
    current = [0]

    def watch(name, layer):
        def keep(_module, inputs, output):
            if not output.requires_grad:  # nothing before this layer needs a gradient
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: note(name, layer, inputs[0].detach(), gradient, current[0]))
            return output
        return layer.register_forward_hook(keep)

    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    denoiser.requires_grad_(False)
    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            for index, (arguments, _) in enumerate(calls):
                output = guided(answer(denoiser, arguments), guidance).float()
                if not torch.isfinite(output).all():
                    raise UserError("the denoiser's output is not finite during calibration; use --dtype float32")
                for probe in range(PROBES):
                    generator = torch.Generator().manual_seed(seed_of(seed, "probe", index, probe))
                    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                    output.backward(signs, retain_graph=probe < PROBES - 1)
                    current[0] += 1
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in zip(denoiser.parameters(), flags):
            parameter.requires_grad_(flag)


def row_energies(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float], layers: Dict[str, nn.Module],
                 seed: int) -> Dict[str, Tensor]:
    """Return γ of each layer, (rows,) float32: the squared gradient at each row's output, summed over places."""
    energies = {name: torch.zeros(len(layer.weight), device=layer.weight.device) for name, layer in layers.items()}

    def note(name, layer, _input, gradient, _probe):
        rows = gradient.float().movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1)
        energies[name] += rows.flatten(0, -2).square().sum(0)

    visit_gradients(denoiser, calls, guidance, layers, seed, note)
    return energies


def sensitivities(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float],
                  layers: Dict[str, nn.Module], changes: Dict[str, Tensor], seed: int) -> Dict[str, float]:
    """Return the mean of (vᵀ J δ)² for each layer, where δ comes from the change of the layer's weight.

    changes: by name, of the weight's shape, in any dtype.
    """
    found = {name: {} for name in layers}

    def note(name, layer, x, gradient, probe):
        change = changes[name].to(x)
        if isinstance(layer, nn.Conv2d):
            delta = layer._conv_forward(x, change, None)
        else:
            delta = F.linear(x, change)
        # A layer that a call uses twice has one product, the sum over both uses.
        found[name][probe] = found[name].get(probe, 0.0) + float((gradient.float() * delta.float()).sum())

    visit_gradients(denoiser, calls, guidance, layers, seed, note)
    return {name: sum(value ** 2 for value in each.values()) / max(len(each), 1) for name, each in found.items()}
