"""Remove feed-forward neurons and ResNet inner channels of lowest L2 norm within their layer (Li et al., 2017)."""
from __future__ import annotations

from functools import partial

from torch import nn

from pruning.methods import Pruned, allocation, surgery

plan = partial(allocation.equal_shares, score=surgery.root_mean_square)  # in a layer, the order of the L2 norm


def prune(denoiser: nn.Module, rate: float, *, mask_only: bool, round_to: int, calibration=None) -> Pruned:
    """Remove (or, with mask_only, zero) round(rate * n) of all n neurons and inner channels, in place.

    Every layer loses the same share, as nearly as its norm groups and round_to allow (see allocation.equal_shares).
    Raises UserError if the denoiser has neither neurons nor inner channels that can be pruned.
    """
    return surgery.prune(denoiser, rate, ("neurons", "channels"), partial(plan, round_to=round_to),
                         mask_only=mask_only, method="structured")
