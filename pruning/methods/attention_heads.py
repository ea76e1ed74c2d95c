"""Remove whole attention heads, self and cross, ranked over the denoiser (Michel et al., 2019, by weight here)."""
from __future__ import annotations

from typing import List

import torch
from torch import nn

from pruning.methods import Pruned, surgery


def prune(denoiser: nn.Module, rate: float, mask_only: bool = False) -> Pruned:
    """Remove (or, with mask_only, zero) exactly round(rate * total) heads, in place.

    An attention may lose all its heads; it then yields its output bias.
    UserError where the denoiser has no attention that can be pruned.
    """
    return surgery.prune(denoiser, rate, mask_only, "attention_heads", ("heads",), plan)


def plan(groups: List[surgery.Group], rate: float) -> surgery.Plan:
    """{group name: heads kept} for the groups that lose any.

    Ranked by the root mean square of a head's weights: a norm would rank the
    heads of wide layers first, and dividing by the layer's own mean would
    hide that some layers matter less, which is what a ranking is for.
    """
    scores = torch.cat([surgery.score(group) for group in groups])
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, stable=True)[:round(rate * len(scores))]] = False
    keeps = {group.name: part.nonzero().flatten().tolist()
             for group, part in zip(groups, kept.split([group.units for group in groups]))}
    return {group.name: keeps[group.name] for group in groups if len(keeps[group.name]) < group.units}
