"""Magnitude pruning: the weights of lowest |w| become zero (Han et al., 2015, arXiv:1506.02626)."""
from __future__ import annotations

from torch import Tensor, nn

from pruning.methods import Pruned, zeroing


def prune(denoiser: nn.Module, rate: float, *, scope: str, calibration=None) -> Pruned:
    """Zero the round(rate * n) of all n prunable weights that have the lowest |w|, in place.

    Raises UserError if the denoiser has no prunable weights or if some are NaN.
    """
    weights = zeroing.prunable_weights(denoiser)
    zeroing.zero_lowest(weights, rate, score, scope)
    return zeroing.report(denoiser, weights, rate, method="magnitude")


def score(rows: Tensor, name: str) -> Tensor:
    """|w|, of the shape of `rows`."""
    return rows.abs()
