"""Magnitude pruning: the weights of lowest |w| become zero (Han et al., 2015, arXiv:1506.02626)."""
from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from pruning.methods import Pruned, moments, weights
from pruning.methods.calibration import Calibration


def prune(denoiser: nn.Module, rate: float, *, calibration: Optional[Calibration] = None, **options) -> Pruned:
    """Zero the round(rate * n) of all n prunable weights that have the lowest |w|, in place.

    options: those of weights.prune_by_score. Raises UserError if the denoiser has no prunable weights or if some are
    NaN.
    """
    return weights.prune_by_score("magnitude", denoiser, rate, score, calibration, **options)


def solver(denoiser: nn.Module, gathered: moments.Moments, calibration: Calibration, *, scope: str, refit: bool,
           **_) -> weights.Solve:
    """Return what becomes of a layer that loses some weights."""
    return weights.by_score(score, scope, None, gathered if refit else None)


def score(rows: Tensor, name: str) -> Tensor:
    """|w|, of the shape of `rows`."""
    return rows.abs()
