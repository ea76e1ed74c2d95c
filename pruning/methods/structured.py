"""Remove feed-forward neurons and ResNet inner channels of lowest L2 norm within their layer (Li et al., 2017)."""
from __future__ import annotations

import math
from typing import Dict, List

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import METHODS, Pruned, surgery

ROUND_TO = METHODS["structured"].options["round_to"]


def prune(denoiser: nn.Module, rate: float, mask_only: bool = False, round_to: int = ROUND_TO) -> Pruned:
    """Remove (or, with mask_only, zero) round(rate * total) neurons and inner channels, in place.

    Every layer loses the same share, as near as its norm groups allow, and as
    leaves it a multiple of round_to where it has one now: kernels are slower
    at odd widths. With round_to=1 the sum is exact unless every layer is down
    to its last neuron, or its last channel a norm group. UserError where the
    denoiser has neither, or for a round_to below 1.
    """
    if round_to < 1:
        raise UserError(f"round_to is a whole number, 1 or more; got {round_to}")
    return surgery.prune(denoiser, rate, mask_only, "structured", ("neurons", "channels"),
                         lambda groups, rate: plan(groups, rate, round_to))


def plan(groups: List[surgery.Group], rate: float, round_to: int = 1) -> surgery.Plan:
    """{group name: units kept} for the groups that lose any."""
    counts = drop_counts(groups, rate, round_to)
    return {group.name: strongest(surgery.score(group), counts[group.name], group.norm_groups)
            for group in groups if counts[group.name]}


def drop_counts(groups: List[surgery.Group], rate: float, round_to: int = 1) -> Dict[str, int]:
    """How many units each group loses, in all round(rate * total) if that can be.

    Coarse layers (many norm groups, each to lose the same number) come first,
    and what their rounding leaves over is spread evenly over the layers to come.
    """
    steps = {group.name: step_of(group, round_to) for group in groups}
    units = sum(group.units for group in groups)
    spare = sum(group.units - steps[group.name] for group in groups)  # one unit a norm group stays
    left = min(round(rate * units), spare)
    counts = {}
    for group in sorted(groups, key=lambda group: -steps[group.name]):
        step, most = steps[group.name], group.units - steps[group.name]
        spare -= most
        least = -(-max(left - spare, 0) // step) * step  # what the layers to come could not take
        counts[group.name] = min(max(round(left * group.units / units / step) * step, least), most)
        left -= counts[group.name]
        units -= group.units
    return counts


def step_of(group: surgery.Group, round_to: int) -> int:
    """By how many units a group may shrink: so many a norm group, and round_to where that divides its width."""
    step = group.norm_groups * round_to // math.gcd(group.norm_groups, round_to)
    return step if group.units % step == 0 else group.norm_groups


def strongest(scores: Tensor, drop: int, norm_groups: int) -> List[int]:
    """Ascending indices that stay when `drop` units go, equally many and the lowest of each norm group."""
    scores = scores.view(norm_groups, -1)
    kept = torch.argsort(scores, dim=1, stable=True)[:, drop // norm_groups:]
    starts = torch.arange(norm_groups)[:, None] * scores.shape[1]
    return (kept + starts).flatten().sort().values.tolist()
