"""Re-fit in order: each layer learns to give its dense outputs from the inputs that reach it in the pruned denoiser.

A re-fit on dense inputs (refit.py) does not know that the layers before have changed. Here some recorded calls go
through the pruned denoiser once. Just before a layer runs, it is re-fitted on its present inputs x' to the dense
outputs y of the same places, and near the weight w1 that it has:

    E|w x' − y|² + ρ (w − w1) H (w − w1)ᵀ + λ |w − w1|²   over w with the zeros of w1

with H = E[x xᵀ] of the dense inputs. So every layer corrects what the layers before it have left over.
"""
from __future__ import annotations

from typing import Any, Dict, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import probes, refit
from pruning.methods.calibration import Calibration, Call, answer
from pruning.methods.moments import Moments, as_rows, input_rows, seed_of, watched
from pruning.methods.recovery import restore_zeros

CALLS = 8  # recorded calls that go through the denoiser together
LATENTS = 128  # latents in these calls, at most
ROWS = 6_000  # places of a layer, at most
PRIOR = 0.1  # ρ: the calls are fewer than those of H


class Aims(NamedTuple):
    """What the layers of the dense denoiser give for some calls."""

    arguments: Dict[str, Any]  # of the calls as one batch
    outputs: Dict[str, Tensor]  # name of the weight -> (groups, n, rows) without bias, on the CPU
    rows: int  # the most places of a layer


@torch.no_grad()
def dense_outputs(denoiser: nn.Module, layers: Dict[str, nn.Module], calibration: Calibration) -> Aims:
    """Return what the layers give for some calls. All outputs together fit calibration.memory.

    If the device has no memory for LATENTS latents together, half as many are taken, and so on.
    """
    calls = probes.probed_calls(calibration.calls, CALLS, lean=1.0)
    widths = sum(len(layer.weight) for layer in layers.values())
    rows = max(1, min(ROWS, calibration.memory // (4 * widths)))
    latents = LATENTS
    while True:
        arguments, count = one_batch(calls, latents)
        try:
            return Aims(arguments, _outputs(denoiser, layers, arguments, rows, calibration.seed), rows)
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                raise UserError("the device has no memory for a denoiser call of one latent; use --offload") from None
            latents = count // 2


def _outputs(denoiser, layers, arguments: Dict[str, Any], rows: int, seed: int) -> Dict[str, Tensor]:
    outputs: Dict[str, Tensor] = {}

    def note(name, layer, x):
        if name not in outputs:  # of several calls of a layer, the first counts
            outputs[name] = (_places(name, layer, x, rows, seed) @ as_rows(layer).float().transpose(1, 2)).cpu()

    with watched(layers, note):
        answer(denoiser, arguments)
    return outputs


@torch.no_grad()
def refit_in_order(denoiser: nn.Module, layers: Dict[str, nn.Module], aims: Aims, gathered: Moments,
                   calibration: Calibration) -> None:
    """Re-fit the weights of the layers that are not zero, in place, in the order in which the layers run.

    aims: from the dense denoiser. gathered: its moments. Raises UserError if a layer's present input is not finite.
    """
    waiting = dict(aims.outputs)

    def note(name, layer, x):
        if name not in waiting:
            return
        x, weight = _places(name, layer, x, aims.rows, calibration.seed), as_rows(layer).float()
        if not torch.isfinite(x).all():
            raise UserError(f"the input of {name} is not finite after pruning; use --dtype float32 or a lower rate")
        y, (dense, _) = waiting.pop(name).to(x.device), gathered.of(name, x.device)
        target = y.transpose(1, 2) @ x / x.shape[1] + PRIOR * weight @ dense
        matrix = x.transpose(1, 2) @ x / x.shape[1]
        damping = refit.add_damping(matrix.add_(dense, alpha=PRIOR))
        kept = weight != 0
        weight = refit.solve_rows(weight, kept, matrix, target + damping * weight)
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        restore_zeros({name: layer.weight}, {name: ~kept.reshape(layer.weight.shape)})

    with watched(layers, note):
        answer(denoiser, aims.arguments)


def one_batch(calls: Sequence[Call], most: int = LATENTS) -> Tuple[Dict[str, Any], int]:
    """Return the arguments of several calls as those of one call on at most `most` of their latents, and how many.

    As many are taken of each call. Tensors with a row a latent follow one another, and a time that holds for a whole
    call becomes one a latent. Calls of another batch size than the first, and calls whose other arguments differ from
    the first's, are left out.
    """
    first, latents = calls[0][0], len(calls[0][1])
    alike = [arguments for arguments, output in calls if len(output) == latents and _joins(first, arguments, latents)]
    alike = alike[:max(1, most)]
    stride = -(-latents * len(alike) // max(1, most))  # strides take of both halves of a guided call
    return _join(alike, latents, stride), len(range(0, latents, stride)) * len(alike)


def _per_latent(name: str, value: Any, latents: int) -> bool:
    return isinstance(value, Tensor) and (name == "timestep" or value.dim() > 0 and len(value) == latents)


def _joins(first: Any, other: Any, latents: int, name: str = "") -> bool:
    """Return whether two arguments can be those of one call: of equal shape if they have a row a latent, else equal."""
    if isinstance(first, dict):
        return isinstance(other, dict) and first.keys() == other.keys() and all(
            _joins(first[key], other[key], latents, key) for key in first)
    if isinstance(first, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(first) == len(other) and all(
            _joins(one, another, latents) for one, another in zip(first, other))
    if isinstance(first, Tensor):
        return isinstance(other, Tensor) and first.shape == other.shape and (
            _per_latent(name, first, latents) or torch.equal(first, other))
    return first == other


def _join(values: list, latents: int, stride: int, name: str = "") -> Any:
    """Return the arguments of calls that _joins approves as one, every `stride`-th latent of each."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values], latents, stride, key) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(each), latents, stride) for each in zip(*values))
    if _per_latent(name, first, latents):
        return torch.cat([(value if value.dim() and len(value) == latents else value.expand(latents))[::stride]
                          for value in values])
    return first


def _places(name: str, layer: nn.Module, x: Tensor, rows: int, seed: int) -> Tensor:
    """Return the inputs of a layer at some places, the same for inputs of the same shape, float32 (groups, n, d)."""
    return input_rows(layer, x, torch.Generator().manual_seed(seed_of(seed, "in order", name)), rows)
