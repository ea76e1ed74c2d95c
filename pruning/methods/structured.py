"""Remove the feed-forward neurons and ResNet inner channels that the layers behind them can best do without.

They go in the order of greedy, the same share of every layer, and the layers behind them are re-fitted. With criterion
"norm", those of lowest L2 norm in their layer go (Li et al., 2017).
"""
from __future__ import annotations

from torch import nn

from pruning.methods import Pruned, units

UNITS = ("neurons", "channels")


def prune(denoiser: nn.Module, rate: float, *, calibration=None, **options) -> Pruned:
    """Remove (or, with mask_only, zero) round(rate * n) of all n neurons and inner channels, in place.

    The count is as near as norm groups and round_to allow (see allocation.equal_shares). options: see units.prune.
    Raises UserError if the denoiser has neither neurons nor inner channels to prune.
    """
    return units.prune("structured", denoiser, rate, UNITS, calibration=calibration, **options)
