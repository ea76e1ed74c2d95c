"""Remove feed-forward neurons and ResNet inner channels of lowest L2 norm within their layer (Li et al., 2017)."""
from __future__ import annotations

from typing import Dict, List

import torch
from torch import Tensor, nn

from pruning.methods import Pruned, surgery


def prune(denoiser: nn.Module, rate: float, mask_only: bool = False) -> Pruned:
    """Remove (or, with mask_only, zero) round(rate * total) neurons and inner channels, in place.

    Every layer loses the same share, as near as its norm groups allow. The sum
    is exact unless every layer is down to its last neuron, or its last channel
    a norm group. UserError where the denoiser has neither.
    """
    return surgery.prune(denoiser, rate, mask_only, "structured", ("neurons", "channels"), plan)


def plan(groups: List[surgery.Group], rate: float) -> surgery.Plan:
    """{group name: units kept} for the groups that lose any."""
    counts = drop_counts(groups, rate)
    return {group.name: strongest(surgery.score(group), counts[group.name], group.norm_groups)
            for group in groups if counts[group.name]}


def drop_counts(groups: List[surgery.Group], rate: float) -> Dict[str, int]:
    """How many units each group loses, in all round(rate * total) if that can be.

    Coarse layers (many norm groups, each to lose the same number) come first,
    and what their rounding leaves over is spread evenly over the layers to come.
    """
    units = sum(group.units for group in groups)
    spare = sum(group.units - group.norm_groups for group in groups)  # one unit a norm group stays
    left = min(round(rate * units), spare)
    counts = {}
    for group in sorted(groups, key=lambda group: -group.norm_groups):
        step, most = group.norm_groups, group.units - group.norm_groups
        spare -= most
        least = -(-max(left - spare, 0) // step) * step  # what the layers to come could not take
        counts[group.name] = min(max(round(left * group.units / units / step) * step, least), most)
        left -= counts[group.name]
        units -= group.units
    return counts


def strongest(scores: Tensor, drop: int, norm_groups: int) -> List[int]:
    """Ascending indices that stay when `drop` units go, equally many and the lowest of each norm group."""
    scores = scores.view(norm_groups, -1)
    kept = torch.argsort(scores, dim=1, stable=True)[:, drop // norm_groups:]
    starts = torch.arange(norm_groups)[:, None] * scores.shape[1]
    return (kept + starts).flatten().sort().values.tolist()
