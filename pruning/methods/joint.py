"""Remove heads, neurons and channels under one budget: multiply-accumulates, parameters or time of the denoiser.

In each group the units go in the order of greedy. How many go from each is decided by the least sum, at the saving
asked for, of the groups' errors after k units:

    E(k) = √(L(k) · C(k)) / (1 − k / units)^p

L is the error of the final latents of a few real sampling steps: s(k) · loss(k), with loss(k) the lost share of output
energy along the order, and s measured with a group alone pruned at FRACTIONS of its units, the layers behind re-fitted,
its logarithm interpolated in between. C is the change of the guided output that probes foresee (units.Order). L alone
is a noisy guide, and C alone is blind to errors that grow over the steps: without all heads of a cross-attention, a
UNet's single call is off by 0.003 and its final latents by 0.6. The last factor keeps groups from being emptied, which
costs more together than each alone: of the plans for the powers p in POWERS, the one goes whose final latents are
nearest to the dense ones.
"""
from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning import UserError
from pruning.methods import LayerPruned, Pruned, greedy, moments, recovery, sequential, surgery, units
from pruning.methods.allocation import most_of, scores_of, step_of
from pruning.methods.calibration import Calibration, match
from pruning.methods.moments import Moments, hooked
from pruning.methods.surgery import Group, Plan
from pruning.metrics import costs

UNITS = ("heads", "neurons", "channels")
FRACTIONS = (0.5, 1.0)  # of a group's units, in measurements
FEW, MANY = 4, 12  # captions whose final latents judge a group, and a plan
POWERS = (1.0, 2.0, 4.0, 8.0)
SLACK = 0.005  # of the whole: a step that saves more than asked by less than this is taken as the last
TIMED = 5  # calls for --budget time


class Path(NamedTuple):
    """What a group can lose: k steps of its order, for each k the units gone, what that saves, and the error."""

    step: int  # units that go together
    saved: float  # by a step
    shares: List[float]  # of the units that are gone after 0, 1, ... steps
    errors: List[float]  # after as many steps, rising


def prune(denoiser: nn.Module, rate: float, *, budget: str, mask_only: bool, round_to: int, recovery_steps: int,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Remove, or with mask_only zero, units until at least `rate` of the budget is saved, in place.

    budget: "macs", "parameters" or "time". Raises UserError if the denoiser has no such units, if all of them together
    save less than asked, or if the calibration cannot sample.
    """
    groups, skipped = surgery.survey(denoiser, *UNITS)
    if not groups:
        raise UserError(f"{type(denoiser).__name__} has no {' or '.join(UNITS)} that joint can remove")
    kept: Plan = {}
    found, total, prices = units.Order(), 1.0, {}
    unit, scale = BUDGETS[budget]
    if rate:
        gathered = moments.gather(denoiser, calibration, layers=units.column_layers(groups))
        found = order_of(denoiser, groups, gathered, calibration)
        arguments = match(calibration.calls[0][0], next(denoiser.parameters()))
        total, prices = prices_of(denoiser, groups, arguments, budget)
        paths = paths_of(denoiser, groups, found, prices, gathered, calibration, round_to)
        aims = units.aims_of(denoiser, groups, calibration)
        kept = best_plan(denoiser, groups, [plan_of(groups, found, paths, power, total, rate) for power in POWERS],
                         aims, gathered, calibration)
        units.take_out_and_refit(denoiser, groups, kept, mask_only, aims, gathered, calibration)
        recovery.recover_at(rate, denoiser, {}, calibration, recovery_steps)
    gone = {group.name: group.units - len(kept.get(group.name, range(group.units))) for group in groups}
    saved = sum(gone[name] * price for name, price in prices.items())
    layers = {group.name: LayerPruned(gone[group.name] / group.units,
                                      found.loss(group, gone[group.name]) if rate else None) for group in groups}
    return Pruned(unit, round(total * scale), round(rate * total * scale), round(saved * scale), skipped, layers)


def largest_rate(denoiser: nn.Module, call: dict, *, budget: str, round_to: int, **_) -> float:
    """Return the share of the budget that all units together save."""
    groups, _ = surgery.survey(denoiser, *UNITS)
    total, prices = prices_of(denoiser, groups, call, budget)
    return sum(prices[group.name] * most_of(group, step_size(denoiser, group, round_to)) for group in groups) / total


def step_size(denoiser: nn.Module, group: Group, round_to: int) -> int:
    """Return how many units of a group go together."""
    return 1 if group.kind.unit == "heads" else step_of(group, units.rounding(denoiser, round_to))


# Budget -> its unit in records, and how many of these one of prices_of makes.
BUDGETS = {"macs": ("multiply-accumulates", 1), "parameters": ("parameters", 1), "time": ("microseconds", 1e6)}


def order_of(denoiser: nn.Module, groups: List[Group], gathered: Moments, calibration: Calibration) -> units.Order:
    """Return the order of the units of all groups; heads and the others are computed apart, as other methods do."""
    heads = [group for group in groups if group.kind.unit == "heads"]
    others = [group for group in groups if group.kind.unit != "heads"]
    found = units.Order()
    for own in filter(None, (heads, others)):
        found.update(units.orders(denoiser, own, gathered, calibration, guided=True))
    return found


def stays(group: Group, found: units.Order, gone: int) -> List[int]:
    """Return the units of a group that stay if the first `gone` of its order go, ascending."""
    place = scores_of(group, found.place)
    return (place >= gone).nonzero().flatten().tolist()


# ---- what a unit saves

def prices_of(denoiser: nn.Module, groups: List[Group], arguments: dict, budget: str) -> Tuple[float, Dict[str, float]]:
    """Return the budget's total for a denoiser call, and what a unit of each group saves of it: group name -> price.

    A unit's rows and columns save their share of their layers, and a head its share of what else its attention does.
    """
    if budget == "parameters":
        return float(sum(parameter.numel() for parameter in denoiser.parameters())), {
            group.name: sum((group.by_unit(layer.weight, dim).numel() + (layer.bias.numel() if dim == 0 and getattr(
                layer, "bias", None) is not None else 0)) / group.units for layer, dim in group.layers())
            for group in groups}
    measured = costs.module_macs(denoiser, arguments) if budget == "macs" else module_seconds(denoiser, arguments)
    names = {id(module): name for name, module in denoiser.named_modules()}
    prices = {}
    for group in groups:
        layers = {id(layer): measured.get(names[id(layer)], 0.0) for layer in group.module.modules()
                  if isinstance(layer, (nn.Linear, nn.Conv2d))}
        price = 0.0
        for layer, dim in group.layers(scored=True):
            price += layers[id(layer)] * group.by_unit(layer.weight, dim).numel() / layer.weight.numel()
        if group.kind.unit == "heads":
            price += max(measured.get(names[id(group.module)], 0.0) - sum(layers.values()), 0.0)
        prices[group.name] = price / group.units
    return measured[""], prices


def module_seconds(denoiser: nn.Module, arguments: dict) -> Dict[str, float]:
    """Return the median seconds of each module's calls in a call of the denoiser, by its name; "" is the denoiser."""
    started: Dict[str, float] = {}
    seconds: Dict[str, List[float]] = {}

    def begin(name):
        def note(_module, _inputs):
            costs.synchronize(next(denoiser.parameters()).device)
            started[name] = time.perf_counter()
        return note

    def end(name):
        def note(_module, _inputs, _output):
            costs.synchronize(next(denoiser.parameters()).device)
            seconds.setdefault(name, []).append(time.perf_counter() - started[name])
        return note

    watched = [(name, module) for name, module in denoiser.named_modules()
               if not name or isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "processor")]
    with torch.no_grad(), hooked([*(module.register_forward_pre_hook(begin(name)) for name, module in watched),
                                  *(module.register_forward_hook(end(name)) for name, module in watched)]):
        for _ in range(TIMED + 1):  # the first warms up
            denoiser(**arguments)
    return {name: statistics.median(times[len(times) // (TIMED + 1):]) * (len(times) // (TIMED + 1))
            for name, times in seconds.items()}


# ---- what a unit costs

def paths_of(denoiser: nn.Module, groups: List[Group], found: units.Order, prices: Dict[str, float],
             gathered: Moments, calibration: Calibration, round_to: int) -> Dict[str, Path]:
    """Return the path of each group, by its name."""
    factors = latent_factors(denoiser, groups, found, gathered, calibration)
    paths = {}
    for group in groups:
        step = step_size(denoiser, group, round_to)
        counts = np.arange(0, most_of(group, step) + 1, step)
        share = counts / group.units
        factor = np.exp(np.interp(share, FRACTIONS, factors[group.name].clamp_min(1e-12).log().numpy()))
        latents = factor * [found.loss(group, count) for count in counts]
        probed = [0.0, *found[group.name][2][counts[1:] - 1].tolist()]
        errors = np.sqrt(latents * probed)
        paths[group.name] = Path(step, prices[group.name] * step, share.tolist(),
                                 np.maximum.accumulate(errors).tolist())
    return paths


def latent_factors(denoiser: nn.Module, groups: List[Group], found: units.Order, gathered: Moments,
                   calibration: Calibration) -> Dict[str, Tensor]:
    """Return how much the final latents change for each share of output energy that a group loses, at FRACTIONS.

    Group name -> (fractions,): squared change of the latents ÷ lost share. Measured once for all rates.
    """
    def compute():
        dense, factors = calibration.latents(denoiser, FEW), {}
        for group in tqdm(groups, desc="error of the latents", unit="group", leave=False):
            own = []
            for fraction in FRACTIONS:
                step = group.norm_groups
                gone = min(max(round(fraction * group.units / step) * step, step), most_of(group, step))
                with one_pruned(group, stays(group, found, gone), gathered):
                    change = (calibration.latents(denoiser, FEW) - dense).square().mean() / dense.var()
                own.append(float(change) / max(found.loss(group, gone), 1e-12))
            factors[group.name] = torch.tensor(own, dtype=torch.float64)
        return factors
    return calibration.keep("error of the latents", compute)


@contextmanager
def one_pruned(group: Group, keep: List[int], gathered: Moments) -> Iterator[None]:
    """Inside the block, the units of a group that do not stay are zeroed and the layers behind them re-fitted."""
    gone = sorted(set(range(group.units)) - set(keep))
    with restored([layer for layer, _ in group.layers()]), torch.no_grad():
        refitted = []
        for columns, (name, layer) in zip(units.columns_of(group, gathered), group.column_layers().items()):
            change, (_, mean) = greedy.change_without(columns, gone), gathered.of(name, layer.weight.device)
            refitted.append((layer, columns.weight + change, change @ mean[0]))
        surgery.mask(group, keep)
        for layer, weight, shift in refitted:
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.sub_(shift)  # the mean output stays
        yield


@contextmanager
def restored(layers: List[nn.Module]) -> Iterator[Callable[[], None]]:
    """Give the layers' parameters back their values when the block ends, or whenever the function in it is called."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    before = {parameter: parameter.detach().to("cpu", copy=True) for parameter in parameters}

    @torch.no_grad()
    def undo():
        for parameter, values in before.items():
            parameter.copy_(values)
    try:
        yield undo
    finally:
        undo()


# ---- what goes

def plan_of(groups: List[Group], found: units.Order, paths: Dict[str, Path], power: float, total: float, rate: float
            ) -> Plan:
    """Return the plan of the least sum of errors ÷ (1 − share gone)^power that saves at least rate · total."""
    weighed = {group.name: paths[group.name]._replace(errors=[
        error / max(1 - share, 0.5 / group.units) ** power
        for share, error in zip(paths[group.name].shares, paths[group.name].errors)]) for group in groups}
    steps = cheapest(weighed, total, rate)
    return {group.name: stays(group, found, steps[group.name] * paths[group.name].step)
            for group in groups if steps[group.name]}


def best_plan(denoiser: nn.Module, groups: List[Group], plans: List[Plan], aims: sequential.Aims, gathered: Moments,
              calibration: Calibration) -> Plan:
    """Return the plan whose final latents are nearest to the dense ones. Each is tried with masks, and undone."""
    plans = [plan for place, plan in enumerate(plans) if plan not in plans[:place]]
    if len(plans) == 1:
        return plans[0]
    dense, errors = calibration.latents(denoiser, MANY), []
    with restored([layer for group in groups for layer, _ in group.layers()]) as undo:
        for plan in tqdm(plans, desc="plans", unit="plan", leave=False):
            units.take_out_and_refit(denoiser, groups, plan, True, aims, gathered, calibration)
            errors.append(float((calibration.latents(denoiser, MANY) - dense).square().mean()))
            undo()
    return plans[errors.index(min(errors))]


def cheapest(paths: Dict[str, Path], total: float, rate: float) -> Dict[str, int]:
    """Return how many steps each group loses: the least sum of errors that saves at least rate · total.

    Raises UserError if all steps together save less.
    """
    asked, most = rate * total, sum((len(path.errors) - 1) * path.saved for path in paths.values())
    if most < asked:
        raise UserError(f"joint cannot save {rate:g} of the budget: without any of these units "
                        f"{most / total:.3f} of it is saved; give lower rates")
    steps, saved, over = dict.fromkeys(paths, 0), 0.0, []
    for _, name, end in sorted((slope, name, end) for name, path in paths.items() for slope, end in hull(path)):
        path = paths[name]
        while steps[name] < end:
            if saved + path.saved > asked + SLACK * total:
                over.append((path.saved, name))  # too large a step for what is left to save
                break
            steps[name] += 1
            saved += path.saved
            if saved >= asked:
                return steps
    _, name = min(over)
    steps[name] += 1
    return steps


def hull(path: Path) -> List[Tuple[float, int]]:
    """Return the lower convex hull of a path's errors over its steps, as (slope over what is saved, last step)."""
    corners = [0]
    for place in range(1, len(path.errors)):
        while len(corners) > 1 and _slope(path, corners[-1], place) <= _slope(path, corners[-2], corners[-1]):
            corners.pop()
        corners.append(place)
    return [(_slope(path, a, b) / path.saved, b) for a, b in zip(corners, corners[1:])]


def _slope(path: Path, a: int, b: int) -> float:
    return (path.errors[b] - path.errors[a]) / (b - a)
