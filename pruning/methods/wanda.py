"""Wanda: the weights of lowest |w| times the root mean square of their input become zero (Sun et al., 2024)."""
from __future__ import annotations

from functools import lru_cache
from typing import Optional

from torch import Tensor, nn

from pruning.methods import Pruned, moments, weights
from pruning.methods.calibration import Calibration


def prune(denoiser: nn.Module, rate: float, *, calibration: Optional[Calibration] = None, **options) -> Pruned:
    """Zero round(rate * n) of all n prunable weights, by default the same share of each output row, in place.

    options: those of weights.prune_by_score. Raises UserError if the denoiser has no prunable weights, or if weights or
    calls are not finite.
    """
    if rate == 0:
        return weights.prune_by_score("wanda", denoiser, rate, lambda rows, name: rows, None, **options)
    gathered, layers = moments.gather(denoiser, calibration), moments.prunable_layers(denoiser)

    @lru_cache(maxsize=1)
    def input_rms(name: str) -> Tensor:
        """The root mean square of each input: (1, inputs, ...), or (rows, inputs / groups, ...) of a grouped layer."""
        weight = layers[name].weight
        squares = gathered.diagonal(name, weight.device)
        if len(squares) > 1:
            squares = squares.repeat_interleave(len(weight) // len(squares), 0)
        return squares.sqrt().reshape(len(squares), *weight.shape[1:])

    return weights.prune_by_score(
        "wanda", denoiser, rate, lambda rows, name: wanda(rows, input_rms(name)), calibration, gathered, **options)


def wanda(weight: Tensor, input_rms: Tensor) -> Tensor:
    """|w| · ‖x‖, compared within each output row (Sun et al., 2024, eq. 1)."""
    return weight.abs() * input_rms
