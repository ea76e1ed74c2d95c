"""Probes: what a change of a layer does to the guided output of the denoiser, for all layers at once.

With y the guided output and δ the change of a layer's weight, the change of y is J δ to first order. For random signs
v, E[(vᵀ J δ)²] = ‖J δ‖² (Hutchinson, 1989). vᵀ J is the gradient of vᵀ y by the weight, and one backward gives the
gradients of all layers. So a few backwards replace one forward a layer.
"""
from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods.calibration import Call, answer
from pruning.methods.moments import hooked, seed_of, timestep

PROBES = 4  # backwards a call, each with signs of its own
CALLS = 8  # calls that are probed
CHECKPOINTED = 10 ** 8  # parameters from which activations are computed twice instead of kept


def probed_calls(calls: Sequence[Call], count: int = CALLS, lean: float = 1.5) -> List[Call]:
    """Return `count` of the calls. More are from the first half of sampling, whose errors reach all later steps.

    lean: 1 takes as many from each half.
    """
    noisiest_first = sorted(calls, key=lambda call: -timestep(call))
    places = [round((len(calls) - 1) * (i / max(count - 1, 1)) ** lean) for i in range(count)]
    return [noisiest_first[place] for place in sorted(set(places))]


def guided(output: Tensor, guidance: Optional[float]) -> Tensor:
    """Return (1 − g) u + g c of a batch whose halves are unconditional and conditional; the output if g is None."""
    if guidance is None:
        return output
    unconditional, conditional = output.chunk(2)
    return (1 - guidance) * unconditional + guidance * conditional


def row_energies(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float], layers: Dict[str, nn.Module],
                 seed: int) -> Dict[str, Tensor]:
    """Return γ of each layer, (rows,) float32: the squared gradient at each row's output, summed over places."""
    energies = {name: torch.zeros(len(layer.weight), device=layer.weight.device) for name, layer in layers.items()}

    def watch(name, layer):
        def note(gradient):
            rows = gradient.float().movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1)
            energies[name] += rows.flatten(0, -2).square().sum(0)

        def hook(_module, _inputs, output):
            if output.requires_grad:  # not where checkpointing only computes values
                output.register_hook(note)
        return layer.register_forward_hook(hook)

    with _gradients(denoiser, layers), hooked(watch(name, layer) for name, layer in layers.items()), \
            hooked(layer.weight.register_post_accumulate_grad_hook(forget) for layer in layers.values()):
        _run_probes(denoiser, calls, guidance, seed)
    return energies


def sensitivities(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float], layers: Dict[str, nn.Module],
                  changes: Dict[str, Tensor], seed: int) -> Dict[str, float]:
    """Return for each layer the mean squared change of the guided output if the layer's weight changes, first order.

    changes: by name, of the weight's shape, in any dtype. The mean is over the values of the output and the calls.
    """
    found: Dict[str, List[float]] = {name: [] for name in layers}

    def watch(name, layer):
        def note(weight):
            found[name].append(float((weight.grad.float() * changes[name].to(weight.device).float()).sum()) ** 2)
            forget(weight)
        return layer.weight.register_post_accumulate_grad_hook(note)

    with _gradients(denoiser, layers), hooked(watch(name, layer) for name, layer in layers.items()):
        backwards = _run_probes(denoiser, calls, guidance, seed)
    return {name: sum(each) / backwards for name, each in found.items()}


def forget(weight: Tensor) -> None:
    """Drop a weight's gradient, so that those of all layers are never in memory together."""
    weight.grad = None


@contextmanager
def _gradients(denoiser: nn.Module, layers: Dict[str, nn.Module]) -> Iterator[None]:
    """Inside the block, only the weights of the layers have gradients. Afterwards all is as before.

    Large denoisers do not keep activations but compute them again (activation checkpointing), if their class knows how.
    """
    flags = [parameter.requires_grad for parameter in denoiser.parameters()]
    large = sum(parameter.numel() for parameter in denoiser.parameters()) > CHECKPOINTED
    denoiser.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    try:
        with recomputing(denoiser, large):
            yield
    finally:
        for parameter, flag in zip(denoiser.parameters(), flags):
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def recomputing(denoiser: nn.Module, wanted: bool) -> Iterator[bool]:
    """Inside the block, compute activations twice instead of keeping them, if wanted and if the class knows how.

    Yields whether the denoiser does so. Results are the same (gradient checkpointing).
    """
    switch = wanted and getattr(denoiser, "_supports_gradient_checkpointing", False) \
        and not denoiser.is_gradient_checkpointing
    if switch:
        denoiser.enable_gradient_checkpointing()
    try:
        yield getattr(denoiser, "is_gradient_checkpointing", False)
    finally:
        if switch:
            denoiser.disable_gradient_checkpointing()


def _run_probes(denoiser: nn.Module, calls: Sequence[Call], guidance: Optional[float], seed: int) -> int:
    """Run PROBES backwards of random signs for each call, and return how many. Raises UserError for NaN or infinity."""
    for index, (arguments, _) in enumerate(calls):
        with torch.enable_grad():
            output = guided(answer(denoiser, arguments), guidance).float()
        if not torch.isfinite(output).all():
            raise UserError("the denoiser's output is not finite during calibration; use --dtype float32")
        for probe in range(PROBES):
            generator = torch.Generator().manual_seed(seed_of(seed, "probe", index, probe))
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            # Divided by the root of their number, (vᵀ J δ)² is a mean, and half precision does not overflow.
            output.backward(signs / signs.numel() ** 0.5, retain_graph=probe < PROBES - 1)
    return PROBES * len(calls)
