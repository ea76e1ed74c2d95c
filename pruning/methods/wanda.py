"""Wanda: the weights of lowest |w| times the root mean square of their input become zero (Sun et al., 2024)."""
from __future__ import annotations

from functools import lru_cache
from typing import Optional

from torch import Tensor, nn

from pruning.methods import Pruned, moments, weights, zeroing
from pruning.methods.calibration import Calibration


def prune(denoiser: nn.Module, rate: float, *, calibration: Optional[Calibration] = None, **options) -> Pruned:
    """Zero round(rate * n) of all n prunable weights, by default the same share of each output row, in place.

    options: those of weights.prune_by_score. Raises UserError if the denoiser has no prunable weights, or if weights or
    calls are not finite.
    """
    gathered = moments.gather(denoiser, calibration) if rate else None
    return weights.prune_by_score(
        "wanda", denoiser, rate, wanda_of(denoiser, gathered), calibration, gathered, **options)


def solver(denoiser: nn.Module, gathered: moments.Moments, calibration: Calibration, *, scope: str, refit: bool,
           **_) -> weights.Solve:
    """Return what becomes of a layer that loses some weights."""
    return weights.by_score(wanda_of(denoiser, gathered), scope, None, gathered if refit else None)


def wanda_of(denoiser: nn.Module, gathered: Optional[moments.Moments]) -> zeroing.Score:
    """Return the score of the denoiser's weights with the moments of its layers' inputs."""
    layers = moments.prunable_layers(denoiser)

    @lru_cache(maxsize=1)
    def input_rms(name: str) -> Tensor:
        """The root mean square of each input: (1, inputs, ...), or (rows, inputs / groups, ...) of a grouped layer."""
        weight = layers[name].weight
        squares = gathered.diagonal(name, weight.device)
        if len(squares) > 1:
            squares = squares.repeat_interleave(len(weight) // len(squares), 0)
        return squares.sqrt().reshape(len(squares), *weight.shape[1:])

    return lambda rows, name: wanda(rows, input_rms(name)) if gathered else rows.abs()


def wanda(weight: Tensor, input_rms: Tensor) -> Tensor:
    """|w| · ‖x‖, compared within each output row (Sun et al., 2024, eq. 1)."""
    return weight.abs() * input_rms
