"""Remove whole attention heads, self and cross, ranked over the denoiser (Michel et al., 2019, here by weight)."""
from __future__ import annotations

from functools import partial

from torch import nn

from pruning.methods import Pruned, allocation, surgery

# A norm as score would rank the heads of wide layers first. A score relative to the layer's mean would hide that some
# layers matter less, and a ranking over the denoiser is to show that.
plan = partial(allocation.lowest_overall, score=surgery.root_mean_square)


def prune(denoiser: nn.Module, rate: float, *, mask_only: bool, calibration=None) -> Pruned:
    """Remove (or, with mask_only, zero) the round(rate * n) of all n heads that have the lowest weights, in place.

    An attention may lose all its heads; its output is then its output bias. Raises UserError if the denoiser has no
    attention that can be pruned.
    """
    return surgery.prune(denoiser, rate, ("heads",), plan, mask_only=mask_only, method="attention_heads")
