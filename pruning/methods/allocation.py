"""Allocation: how much each layer or group loses at a given rate. For units, gives the plans that surgery carries out.

A criterion is one function, score(group) -> (units,) tensor, the lowest first to go.
"""
from __future__ import annotations

import math
from typing import Callable, Dict, List, Sequence

import torch
from torch import Tensor

from pruning import UserError
from pruning.methods.surgery import Group, Plan

Score = Callable[[Group], Tensor]

HEADROOM = 0.6  # a layer loses at most rate + HEADROOM · (1 − rate): errors of layers do not add up near 1


def lowest_overall(groups: List[Group], rate: float, score: Score, round_to: int = 1) -> Plan:
    """Plan to remove the round(rate * n) of all n units that have the lowest scores, wherever they are.

    Equally many go from each norm group, and a width that is a multiple of round_to stays one; so units go in steps by
    their mean score, and a few may be missing. Of equal scores the first in order go. A group may lose all its units if
    its module works without. Raises UserError if a score is NaN.
    """
    scores = {group.name: scores_of(group, score) for group in groups}
    steps = []  # (mean score, place of the group, units), in the order of each group
    for place, group in enumerate(groups):
        step = step_of(group, round_to)
        ascending = scores[group.name].view(group.norm_groups, -1).sort(dim=1).values.T.flatten()
        means = ascending[:most_of(group, step)].view(-1, step).mean(1)
        steps += [(mean, place, step) for mean in means.tolist()]
    left, drops = round(rate * sum(group.units for group in groups)), [0] * len(groups)
    for _, place, step in sorted(steps, key=lambda each: each[0]):
        if step <= left:
            drops[place] += step
            left -= step
    return {group.name: highest(scores[group.name], drop, group.norm_groups)
            for group, drop in zip(groups, drops) if drop}


def equal_shares(groups: List[Group], rate: float, score: Score, round_to: int = 1) -> Plan:
    """Plan to remove the same share of every group: its units of lowest score, equally many from each norm group.

    A width that is a multiple of round_to stays one. Of all n units as near to round(rate * n) go as the smallest step
    of a group allows, see step_of: exactly as many if it is 1, unless every group is down to the one unit a norm group
    that must stay. Of equal scores the first in order go. Raises UserError if a score is NaN.
    """
    counts = drop_counts(groups, rate, round_to)
    return {group.name: highest(scores_of(group, score), counts[group.name], group.norm_groups)
            for group in groups if counts[group.name]}


def scores_of(group: Group, score: Score) -> Tensor:
    """Return the scores of a group's units, (units,), on the CPU. Raises UserError if a score is NaN."""
    scores = score(group).cpu()
    if scores.shape != (group.units,):
        raise ValueError(f"a score of {group.name} is {tuple(scores.shape)} for {group.units} units")
    if scores.isnan().any():
        raise UserError(f"{group.name} has scores that are NaN and so have no order; check the weights of the model")
    return scores


def drop_counts(groups: List[Group], rate: float, round_to: int = 1) -> Dict[str, int]:
    """Return how many units each group loses: the same share, in sum the nearest to round(rate * n) of all n units.

    Groups with coarse steps are rounded first, and their rounding errors are spread evenly over the finer groups.
    """
    steps = {group.name: step_of(group, round_to) for group in groups}
    units = sum(group.units for group in groups)
    spare = sum(most_of(group, steps[group.name]) for group in groups)
    left = min(round(rate * units), spare)
    counts = {}
    for group in sorted(groups, key=lambda group: -steps[group.name]):
        step = steps[group.name]
        most = most_of(group, step)
        spare -= most  # what the later groups could lose
        share = round(left * group.units / units / step) * step
        counts[group.name] = min(range(0, most + 1, step), key=lambda count: (
            max(count - left, left - spare - count, 0), abs(count - share)))
        left -= counts[group.name]
        units -= group.units
    return counts


def most_of(group: Group, step: int) -> int:
    """Return how many units a group can lose: all, or all but one step if a unit must stay."""
    return group.units if group.kind.empty else group.units - step


def step_of(group: Group, round_to: int) -> int:
    """Return the number of units that a group loses at a time: one a norm group, times what round_to asks for.

    round_to counts only if the group's width is a multiple of the resulting step.
    """
    step = group.norm_groups * round_to // math.gcd(group.norm_groups, round_to)
    return step if group.units % step == 0 else group.norm_groups


def highest(scores: Tensor, drop: int, norm_groups: int) -> List[int]:
    """Return the ascending indices that stay if `drop` units go: the lowest scores of each norm group, equally many."""
    scores = scores.view(norm_groups, -1)
    kept = torch.argsort(scores, dim=1, stable=True)[:, drop // norm_groups:]
    starts = torch.arange(norm_groups)[:, None] * scores.shape[1]
    return (kept + starts).flatten().sort().values.tolist()


def least_change(sizes: Dict[str, int], knots: Sequence[float], curves: Dict[str, Sequence[float]],
                 sensitivities: Dict[str, float], rate: float, zeros: Dict[str, int],
                 headroom: float = HEADROOM) -> Dict[str, int]:
    """Return how many weights each layer loses, in sum round(rate * n): the least sum of sensitivity · error.

    sizes: weights of each layer. knots, curves: rates, and each layer's relative error there; between them the
    logarithm is interpolated, and at 1 the error is 1. zeros: how many weights of each layer are zero already, which
    stay zero. The multiplier λ is the price of a weight. At each price a layer takes the rate with the least
    s · e + λ · weights left, and bisection finds the price at which all layers together lose enough.
    """
    total = round(rate * sum(sizes.values()))
    cap = rate + headroom * (1 - rate)
    grid = torch.linspace(0, 1, 501).double()[: int(500 * cap) + 1]
    at_knots = torch.tensor([*knots, 1.0]).double()
    place = torch.searchsorted(at_knots, grid, right=True).clamp(1, len(at_knots) - 1)
    share = (grid - at_knots[place - 1]) / (at_knots[place] - at_knots[place - 1])
    costs = []
    for name in sizes:
        logs = torch.tensor([*curves[name], 1.0]).double().clamp(1e-9, 1.0).cummax(0).values.log()
        costs.append(sensitivities[name] * (logs[place - 1] + share * (logs[place] - logs[place - 1])).exp())
    costs, numels = torch.stack(costs), torch.tensor(list(sizes.values())).double()[:, None]

    def counts_at(price: float) -> List[int]:
        chosen = grid[(costs - math.exp(price) * numels * grid).argmin(1)]
        return [max(zeros[name], int(each * size)) for each, (name, size) in zip(chosen.tolist(), sizes.items())]

    low, high = -90.0, 60.0  # natural logarithms of the price
    for _ in range(80):
        middle = (low + high) / 2
        if sum(counts_at(middle)) < total:
            low = middle
        else:
            high = middle
    below, above = counts_at(low), counts_at(high)
    if sum(below) > total:  # layers that the output does not feel lose more, even at no price
        below = [zeros[name] for name in sizes]
    missing = total - sum(below)
    counts = {}
    for name, least, most in zip(sizes, below, above):  # from the one solution to the other, to the weight
        counts[name] = least + min(max(missing, 0), max(most, least) - least)
        missing -= counts[name] - least
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # caps round down
        more = min(max(missing, 0), sizes[name] - counts[name])
        counts[name] += more
        missing -= more
    return counts
