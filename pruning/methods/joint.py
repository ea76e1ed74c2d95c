"""Remove blocks, heads, neurons, channels and ranks under one budget: multiply-accumulates, parameters or call time.

In each group the units go in the order of greedy. How many go from each is decided by the least sum, at the saving
asked for, of the groups' errors after k units:

    E(k) = √(L(k) · C(k)) / (1 − k / units)^p

L is the error of the final latents of a few real sampling steps: s(k) · loss(k), with loss(k) the lost share of output
energy along the order, and s measured with a group alone pruned at FRACTIONS of its units, the layers behind re-fitted,
its logarithm interpolated in between. C is the change of the guided output that probes foresee (units.Order). L alone
is a noisy guide, and C alone is blind to errors that grow over the steps: of two emptied attentions of shapes-unet, one
changes a call by 0.002 and the final latents by 0.94, the other by 0.035 and 0.06. The last factor spreads what goes
over the groups, because what is taken costs more together than each alone: of the plans for the powers p in POWERS, the
one goes whose final latents are nearest to the dense ones. Most of all this holds for attentions that lose their last
head: the error of these counts EMPTIED times, so that they only go where little else is left to take.

Then the same plan is tried with some whole blocks bypassed (blocks) and less taken from the others: with shares
BYPASSED of the blocks, as long as the final latents come nearer to the dense ones.

Ranks of AdaLN layers (modulation) hold many of a transformer's parameters and next to none of its multiply-accumulates,
so only the budget of parameters takes them. Their C is measured like L.
"""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from pruning import UserError
from pruning.methods import (
    LayerPruned,
    Pruned,
    blocks,
    budgets,
    bypass,
    losses,
    modulation,
    moments,
    ranks,
    sequential,
    surgery,
    units,
)
from pruning.methods.allocation import most_of
from pruning.methods.calibration import Calibration, match
from pruning.methods.modulation import Basis
from pruning.methods.moments import Moments
from pruning.methods.options import BUDGETS
from pruning.methods.surgery import Group
from pruning.progress import tqdm

UNITS = surgery.UNITS
MANY = 12  # captions whose final latents judge a plan
POWERS = (1.0, 2.0, 4.0, 8.0)
EMPTIED = 1e4  # times the error of an attention without heads
BYPASSED = (0.1, 0.2)  # of the blocks
BYPASSED_ERROR = 0.25  # of the final latents without these blocks, not re-fitted: beyond it, units keep more
SLACK = 0.005  # of the whole: a step that saves more than asked by less than this is taken as the last
Steps = Dict[str, int]  # name of a path -> steps taken of it


class Case(NamedTuple):
    """A denoiser, dense or without some blocks, and all that was computed for it."""

    denoiser: nn.Module
    groups: List[Group]
    found: units.Order
    known: Dict[str, Basis]  # path name -> basis
    paths: Dict[str, losses.Path]
    aims: sequential.Aims
    gathered: Moments
    calibration: Calibration
    dense_latents: Tensor  # of MANY captions
    saved: float = 0.0  # of the budget, by blocks


class Plan(NamedTuple):
    """What goes, and the squared error of the final latents that follows."""

    bypassed: Dict[str, bypass.Streams]
    power: float
    steps: Steps
    error: float
    aims: Optional[sequential.Aims] = None  # of the layers that are re-fitted if blocks go


def prune(denoiser: nn.Module, rate: float, *, budget: str, mask_only: bool, round_to: int,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Remove, or with mask_only zero, blocks and units until at least `rate` of the budget is saved, in place.

    budget: one of BUDGETS. Raises UserError if the denoiser has no such units, if all of them together save
    less than asked, or if the calibration cannot sample.
    """
    groups, skipped = surgery.survey(denoiser, *UNITS)
    if not groups:
        raise UserError(f"{type(denoiser).__name__} has no {' or '.join(UNITS)} that joint can remove")
    unit, scale = BUDGETS[budget]
    if rate == 0:
        return Pruned(unit, 1, 0, 0, skipped, {group.name: LayerPruned(0.0) for group in groups})
    total, dense = case_of(denoiser, groups, calibration, budget, round_to)
    reached, inexact = reached_by(dense), surgery.inexact(groups)
    plan = with_blocks(dense, best(dense, total, rate), budget, total, rate)
    case = dense
    if plan.bypassed:
        case = without(dense, plan.bypassed, budget, total)
        blocks.take_out(denoiser, plan.bypassed, plan.aims, mask_only, calibration)
    carry_out(case, plan.steps, mask_only)
    saved = case.saved + sum(path.saved[plan.steps[name]] for name, path in case.paths.items())
    emptied = {group.name: LayerPruned(1.0) for group in groups if group.name not in case.paths}
    layers = {**layers_of(case, plan.steps), **emptied}
    return Pruned(unit, round(total * scale), round(rate * total * scale), round(saved * scale), skipped,
                  {**{group.name: layers.pop(group.name) for group in groups}, **layers}, reached, inexact=inexact)


def reached_by(dense: Case) -> Dict[str, int]:
    """Return how many numbers of each parameter go with units, ranks or blocks, by name."""
    layers = {name: dense.denoiser.get_submodule(name) for basis in dense.known.values() for name in basis.names}
    found = bypass.find(dense.denoiser, dense.calibration.calls[0][0])
    return {**surgery.reached(dense.denoiser, dense.groups), **modulation.reached(layers),
            **bypass.reached(dense.denoiser, found)}


def case_of(denoiser: nn.Module, groups: List[Group], calibration: Calibration, budget: str, round_to: int
            ) -> Tuple[float, Case]:
    """Return the budget's total and all that is computed for a dense denoiser."""
    gathered = moments.gather(denoiser, calibration, layers=units.column_layers(groups))
    found = losses.order_of(denoiser, groups, gathered, calibration)
    total, prices = budgets.prices(denoiser, groups, call_of(denoiser, calibration), budget)
    with_ranks = budget == "parameters" and ranks.modulation_layers(denoiser)
    bases = modulation.bases(denoiser, calibration) if with_ranks else []
    known = {f"{basis.names[0]}.ranks": basis for basis in bases}
    paths = {**losses.unit_paths(denoiser, groups, found, prices, gathered, calibration, round_to),
             **losses.rank_paths(denoiser, known, calibration)}
    aims = units.aims_of(denoiser, groups, calibration, {})
    return total, Case(denoiser, groups, found, known, paths, aims, gathered, calibration,
                       calibration.dense_latents(denoiser, MANY))


def without(dense: Case, bypassed: Dict[str, bypass.Streams], budget: str, total: float) -> Case:
    """Return the case of the denoiser when these blocks are gone. total: the budget's, of the dense denoiser."""
    denoiser, known = dense.denoiser, {}
    groups = [group for group in dense.groups if not bypass.inside(group.name, bypassed)]
    with bypass.bypassed(denoiser, bypassed):  # where masks stand for blocks, these still cost
        left, prices = budgets.prices(denoiser, groups, call_of(denoiser, dense.calibration), budget)
    paths = {group.name: dense.paths[group.name].priced(prices[group.name]) for group in groups}
    for name, basis in dense.known.items():
        names = [each for each in basis.names if not bypass.inside(each, bypassed)]
        if names:
            known[name] = basis._replace(names=names)
            shapes = [denoiser.get_submodule(each).weight.shape for each in names]
            paths[name] = dense.paths[name]._replace(saved=losses.rank_savings(shapes))
    return dense._replace(groups=groups, known=known, paths=paths, saved=total - left)


def call_of(denoiser: nn.Module, calibration: Calibration) -> dict:
    """Return the keyword arguments of a recorded call as the denoiser takes them."""
    return match(calibration.calls[0][0], next(denoiser.parameters()))


def largest_rate(denoiser: nn.Module, call: dict, *, budget: str, round_to: int, **_) -> float:
    """Return the share of the budget that all units together save."""
    groups, _ = surgery.survey(denoiser, *UNITS)
    total, prices = budgets.prices(denoiser, groups, call, budget)
    saved = sum(prices[group.name] * most_of(group, losses.step_size(denoiser, group, round_to)) for group in groups)
    if budget == "parameters" and ranks.modulation_layers(denoiser):  # but for one rank, of one basis at best
        layers = ranks.modulation_layers(denoiser).values()
        saved += losses.rank_parameters([layer.weight.shape for layer in layers], 0) - losses.rank_parameters(
            [layer.weight.shape for layer in layers], 1)
    return saved / total


def weighed(paths: Dict[str, losses.Path], power: float) -> Dict[str, losses.Path]:
    """Return the paths with errors ÷ (1 − share gone)^power, and those without any unit EMPTIED times that."""
    return {name: path._replace(errors=[
        error * (EMPTIED if share == 1 else 1) / max(1 - share, path.shares[1] / 2) ** power if share else error
        for share, error in zip(path.shares, path.errors)]) for name, path in paths.items()}


def cheapest(paths: Dict[str, losses.Path], total: float, rate: float) -> Steps:
    """Return how many steps each path takes: the least sum of errors that saves at least rate · total.

    Raises UserError if all steps together save less.
    """
    asked, most = rate * total, sum(path.saved[-1] for path in paths.values())
    if most < asked:
        raise UserError(f"joint cannot save {rate:g} of the budget: without any of these units "
                        f"{most / total:.3f} of it is saved; give lower rates")
    steps, saved, over = dict.fromkeys(paths, 0), 0.0, []
    for _, name, end in sorted((slope, name, end) for name, path in paths.items() for slope, end in hull(path)):
        while steps[name] < end:
            more = paths[name].saved[steps[name] + 1] - paths[name].saved[steps[name]]
            if saved + more > asked + SLACK * total:
                over.append((more, name))  # too large a step for what is left to save
                break
            steps[name] += 1
            saved += more
            if saved >= asked:
                return steps
    _, name = min(over)
    steps[name] += 1
    return steps


def hull(path: losses.Path) -> List[Tuple[float, int]]:
    """Return the lower convex hull of a path's errors over what is saved, as (slope, last step). Savings must rise."""
    corners = [0]
    for place in range(1, len(path.errors)):
        if path.saved[place] <= path.saved[corners[-1]]:
            continue
        while len(corners) > 1 and _slope(path, corners[-1], place) <= _slope(path, corners[-2], corners[-1]):
            corners.pop()
        corners.append(place)
    return [(_slope(path, a, b), b) for a, b in zip(corners, corners[1:])]


def _slope(path: losses.Path, a: int, b: int) -> float:
    return (path.errors[b] - path.errors[a]) / (path.saved[b] - path.saved[a])


def best(case: Case, total: float, rate: float) -> Plan:
    """Return the plan without blocks whose final latents are nearest to the dense ones."""
    plans: List[Plan] = []
    for power in tqdm(POWERS, desc="plans", unit="plan", leave=False):
        steps = cheapest(weighed(case.paths, power), total, rate)
        if steps not in [plan.steps for plan in plans]:
            plans.append(Plan({}, power, steps, tried(case, steps)))
    return min(plans, key=lambda plan: plan.error)


def with_blocks(dense: Case, plan: Plan, budget: str, total: float, rate: float) -> Plan:
    """Return a plan that bypasses blocks too, if its final latents are nearer to the dense ones; else `plan`."""
    denoiser, calibration = dense.denoiser, dense.calibration
    found = bypass.find(denoiser, calibration.calls[0][0])
    if not found:
        return plan
    order = blocks.order_of(denoiser, found, calibration)
    for count in sorted({round(share * len(found)) for share in BYPASSED} - {0}):
        bypassed = {name: found[name] for name in order.names[:count]}
        case = without(dense, bypassed, budget, total)
        if order.errors[count - 1] > BYPASSED_ERROR or case.saved > (rate + SLACK) * total:
            break
        aims = plan.aims or blocks.aims_of(denoiser, calibration)
        with losses.restored(list(moments.prunable_layers(denoiser).values())), bypass.bypassed(denoiser, bypassed):
            blocks.refit(denoiser, bypassed, aims, calibration)
            steps = cheapest(weighed(case.paths, plan.power), total, rate - case.saved / total)
            error = tried(case, steps)
        if error >= plan.error:
            break
        plan = Plan(bypassed, plan.power, steps, error, aims)
    return plan


def tried(case: Case, steps: Steps) -> float:
    """Return the squared error of the final latents after these steps, which are taken with masks and undone."""
    layers = [part.layer for group in case.groups for part in group.parts()]
    layers += [case.denoiser.get_submodule(name) for basis in case.known.values() for name in basis.names]
    with losses.restored(layers):
        carry_out(case, steps, mask_only=True)
        return float((case.calibration.latents(case.denoiser, MANY) - case.dense_latents).square().mean())


def carry_out(case: Case, steps: Steps, mask_only: bool) -> None:
    """Take ranks and units out of the denoiser, and re-fit the layers behind the units."""
    for name, basis in case.known.items():
        if steps[name]:
            modulation.take(case.denoiser, basis, len(basis.mean) - steps[name], mask_only)
    plan = {group.name: losses.stays(group, case.found, steps[group.name] * case.paths[group.name].step)
            for group in case.groups if steps[group.name]}
    if plan:
        helping = units.gated_layers(case.denoiser, units.column_layers(case.groups))
        units.take_out_and_refit(case.denoiser, case.groups, plan, mask_only, case.aims, case.gathered,
                                 case.calibration, helping)


def layers_of(case: Case, steps: Steps) -> Dict[str, LayerPruned]:
    """Return what happened to each group of units and to each layer whose ranks were taken."""
    found = {}
    for group in case.groups:
        gone = steps[group.name] * case.paths[group.name].step
        found[group.name] = LayerPruned(gone / group.units, case.found.loss(group, gone))
    for name, basis in case.known.items():
        lost = float(basis.lost[len(basis.mean) - steps[name]]) if steps[name] else 0.0
        found.update({f"{each}.weight": LayerPruned(steps[name] / len(basis.mean), lost) for each in basis.names})
    return found
