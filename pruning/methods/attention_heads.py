"""Remove the attention heads, self and cross, that the layers behind them can best do without.

In an attention they go in the order of greedy, and over the denoiser by what their loss costs the guided output. The
layers behind them are re-fitted. With criterion "norm", those of lowest weight over the denoiser go (Michel et al.,
2019, here by weight): a norm as score would rank the heads of wide layers first, so it is the root mean square.
"""
from __future__ import annotations

from torch import nn

from pruning.methods import Pruned, units

UNITS = ("heads",)


def prune(denoiser: nn.Module, rate: float, *, calibration=None, **options) -> Pruned:
    """Remove (or, with mask_only, zero) round(rate * n) of all n heads, in place.

    An attention may lose all its heads; its output is then its output bias. options: see units.prune. Raises UserError
    if the denoiser has no attention that can be pruned.
    """
    return units.prune("attention_heads", denoiser, rate, UNITS, calibration=calibration, **options)
