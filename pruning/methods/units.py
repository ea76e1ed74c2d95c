"""The steps that methods which remove units share: order, plan, take out, re-fit.

Such a method is the names of its units in KINDS, and its options.
"""
from __future__ import annotations

from functools import partial
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import (
    METHODS,
    LayerPruned,
    Pruned,
    greedy,
    moments,
    probes,
    sequential,
    surgery,
)
from pruning.methods import refit as refitting
from pruning.methods.allocation import equal_shares, lowest_overall
from pruning.methods.calibration import Calibration
from pruning.methods.moments import Moments, as_rows
from pruning.methods.surgery import Group, Plan
from pruning.progress import tqdm

HEADROOM = 0.3  # a group loses at most rate + HEADROOM · (1 − rate): one call says too little of an emptied attention
HALF_ROUND_TO = 8  # 16 bytes of half precision: kernels of GPUs take up to twice as long at other widths
CALLS, LATENTS = 16, 384  # recorded calls, and latents in them at most, that the re-fit in order sends through


class Order(Dict[str, Tuple[Tensor, Tensor, Tensor]]):
    """Group name -> units in the order in which they go; the loss and the cost after each, (units,).

    The loss is the mean lost share of output energy of the layers behind them, the cost the squared change of the
    guided output that follows from it to first order.
    """

    def place(self, group: Group) -> Tensor:
        """Return the place of each unit in the order, (units,)."""
        return self._of_units(group, torch.arange(group.units, dtype=torch.float64))

    def price(self, group: Group, rate: float) -> Tensor:
        """Return what the loss of each unit costs when its turn comes, (units,), rising in the order.

        See HEADROOM for how many a group can lose.
        """
        _, _, costs = self[group.name]
        prices = torch.diff(costs, prepend=torch.zeros(1, dtype=costs.dtype)).cummax(0).values
        prices = prices * (1 + 1e-9 * torch.arange(group.units)) + 1e-30 * torch.arange(group.units)  # no two alike
        prices[round((rate + HEADROOM * (1 - rate)) * group.units):] = float("inf")
        return self._of_units(group, prices)

    def _of_units(self, group: Group, values: Tensor) -> Tensor:
        """Return values by unit that are given in the order in which the units go."""
        return torch.empty_like(values).scatter_(0, self[group.name][0], values)

    def loss(self, group: Group, count: int) -> float:
        """Return the relative loss of the layers behind the units after `count` of these are gone."""
        return float(self[group.name][1][count - 1]) if count else 0.0


def prune(method: str, denoiser: nn.Module, rate: float, units: Sequence[str],
          *, criterion: str, allocation: str, refit: bool, mask_only: bool,
          calibration: Optional[Calibration], round_to: int = 1) -> Pruned:
    """Remove, or with mask_only zero, round(rate * n) of all n of the denoiser's units, in place.

    As many as allocation allows: where all units go in steps of a norm group or of round_to, the sum may miss that.

    units: names of units in KINDS. criterion: what decides the order in a group, "loss" (see greedy) or "norm".
    allocation: "uniform" takes the same share of every group, "guided" ranks all units, by what their loss costs the
    guided output or by their norm. The other options are those of METHODS; rate 0 changes nothing. Raises UserError if
    the denoiser has no such units.
    """
    groups, skipped = surgery.survey(denoiser, *units)
    if not groups:
        reasons = "".join(f"; {name}: {why}" for name, why in list(skipped.items())[:3])
        held = {p: p.numel() for name in skipped for p in denoiser.get_submodule(name).parameters()}
        share = sum(held.values()) / sum(p.numel() for p in denoiser.parameters())
        raise UserError(f"{type(denoiser).__name__} has no {' or '.join(units)} that {method} can remove{reasons}" + (
            f" ({len(skipped)} such modules hold {100 * share:.1f} % of the parameters)" if skipped else ""))
    total = sum(group.units for group in groups)
    round_to = rounding(denoiser, round_to)
    kept: Plan = {}
    found, gathered = None, None
    helping = helping_layers(denoiser) if refit and rate else {}
    if rate:
        if criterion == "loss" or refit:
            gathered = moments.gather(denoiser, calibration, layers={**helping, **column_layers(groups)})
        if criterion == "loss":
            found = orders(denoiser, groups, gathered, calibration, allocation == "guided")
        if allocation == "uniform":
            kept = equal_shares(groups, rate, found.place if found else surgery.root_mean_square, round_to)
        else:
            kept = lowest_overall(groups, rate, partial(found.price, rate=rate) if found else surgery.root_mean_square,
                                  round_to)
    reached, inexact = surgery.reached(denoiser, groups), surgery.inexact(groups)
    gone = {group.name: group.units - len(kept.get(group.name, range(group.units))) for group in groups}
    if refit and kept:
        aims = aims_of(denoiser, [group for group in groups if group.name in kept], calibration, helping)
        take_out_and_refit(denoiser, groups, kept, mask_only, aims, gathered, calibration, helping)
    else:
        surgery.carry_out(denoiser, groups, kept, mask_only)
    layers = {group.name: LayerPruned(gone[group.name] / group.units,
                                      found.loss(group, gone[group.name]) if found and refit else None)
              for group in groups}
    return Pruned(METHODS[method].unit, total, round(rate * total), sum(gone.values()), skipped, layers,
                  reached, inexact=inexact)


def rounding(denoiser: nn.Module, round_to: int) -> int:
    """Return the number that widths stay multiples of: round_to, or if it is 0 what suits the denoiser's dtype."""
    return round_to or (HALF_ROUND_TO if next(denoiser.parameters()).element_size() == 2 else 1)


def column_layers(groups: List[Group]) -> Dict[str, nn.Module]:
    """Return the layers behind the units of these groups, by the name of the weight."""
    return {name: layer for group in groups for name, layer in group.column_layers().items()}


def orders(denoiser: nn.Module, groups: List[Group], gathered: Moments, calibration: Calibration,
           guided: bool) -> Order:
    """Return in which order the units of each group go, computed once for all rates.

    guided: the layers behind a group's units count by how much the guided output depends on them; otherwise alike.
    """
    def compute():
        alike = {group.name: greedy.order(columns_of(group, gathered), group.units, group.norm_groups)
                 for group in tqdm(groups, desc="order of units", unit="group", leave=False)}
        weights = sensitivities(denoiser, groups, alike, gathered, calibration) if guided else {}
        found = {}
        for group in groups:
            own = [weights.get(name, 1.0) for name in group.column_layers()]
            taken, losses = alike[group.name]
            if guided and len(own) > 1:  # with one layer, its weight decides nothing
                taken, losses = greedy.order(columns_of(group, gathered), group.units, group.norm_groups, own)
            losses = torch.tensor(losses, dtype=torch.float64)
            found[f"{group.name} order"], found[f"{group.name} losses"] = torch.tensor(taken), losses.mean(1)
            found[f"{group.name} costs"] = losses @ torch.tensor(own, dtype=torch.float64)
        return found
    what = " ".join(sorted({group.kind.unit for group in groups}))
    found = calibration.keep(f"order of {what}{' guided' * guided}", compute)
    return Order({group.name: tuple(found[f"{group.name} {each}"] for each in ("order", "losses", "costs"))
                  for group in groups})


def sensitivities(denoiser: nn.Module, groups: List[Group], alike: Dict[str, Tuple[List[int], List[List[float]]]],
                  gathered: Moments, calibration: Calibration) -> Dict[str, float]:
    """Return how much the guided output depends on each layer behind the units: squared change ÷ lost share of energy.

    Probed to first order with half of the units gone and the rest re-fitted: name of the weight -> value. alike: what
    greedy.order gives for each group if its layers count alike.
    """
    changes, losses, layers = {}, {}, {}
    for group in groups:
        columns, (taken, lost) = columns_of(group, gathered), alike[group.name]
        half = max(1, group.units // 2)
        for index, (name, layer) in enumerate(group.column_layers().items()):
            change = greedy.change_without(columns[index], taken[:half]).reshape(layer.weight.shape)
            changes[name], losses[name], layers[name] = change.to(layer.weight.dtype), lost[half - 1][index], layer
    calls = probes.probed_calls(calibration.calls)
    found = probes.sensitivities(denoiser, calls, calibration.guidance, layers, changes, calibration.seed)
    return {name: value / max(losses[name], 1e-12) for name, value in found.items()}


def columns_of(group: Group, gathered: Moments) -> List[greedy.Columns]:
    """Return the layers behind a group's units with their moments."""
    found = []
    for name, part in group.columns().items():
        matrix, _ = gathered.of(name, part.layer.weight.device)
        places = part.layer.weight[0, 0].numel()
        found.append(greedy.Columns(as_rows(part.layer).detach()[0].float(), matrix[0], part.first * places,
                                    part.count // group.units * places))
    return found


def kept_columns(groups: List[Group], plan: Plan) -> Dict[str, Tensor]:
    """Return which inputs of the layers behind the units a plan keeps: name of the weight -> indices, ascending."""
    stays: Dict[str, Tensor] = {}
    for group in groups:
        if group.name in plan:
            unit = torch.zeros(group.units, dtype=torch.bool)
            unit[plan[group.name]] = True
            for name, part in group.columns().items():
                channels = stays.setdefault(name, torch.ones(part.layer.weight.shape[1], dtype=torch.bool))
                channels[part.first:part.first + part.count] &= unit.repeat_interleave(part.count // group.units)
    layers = column_layers(groups)
    return {name: channels.repeat_interleave(layers[name].weight[0, 0].numel()).nonzero().flatten()
            for name, channels in stays.items()}


def helping_layers(denoiser: nn.Module) -> Dict[str, nn.Module]:
    """Return the gated layers behind units of any kind, by the name of the weight."""
    return gated_layers(denoiser, column_layers(surgery.find_groups(denoiser, surgery.UNITS)[0]))


def gated_layers(denoiser: nn.Module, layers: Dict[str, nn.Module]) -> Dict[str, nn.Module]:
    """Return those of some layers whose output goes to a residual stream through a known gate.

    These can make up for units that are gone elsewhere. Without gates, as in UNets, such layers gain nothing.
    """
    return {name: layers[name] for name, (_, row) in sequential.streams_of(denoiser, layers).items() if row.gate}


def aims_of(denoiser: nn.Module, groups: List[Group], calibration: Calibration,
            helping: Dict[str, nn.Module]) -> sequential.Aims:
    """Return what the dense denoiser gives: the layers behind these units, helping layers, and norms over the units."""
    norms = {name: norm for group in groups for name, norm in _norms(group).items()}
    layers = {**helping, **column_layers(groups)}
    return sequential.dense_outputs(denoiser, layers, calibration, norms, residual=True, calls=CALLS,
                                    latents=LATENTS)


def take_out_and_refit(denoiser: nn.Module, groups: List[Group], plan: Plan, mask_only: bool, aims: sequential.Aims,
                       gathered: Moments, calibration: Calibration, helping: Dict[str, nn.Module]) -> None:
    """Carry out a plan, and re-fit the layers behind the units, and helping ones, in the order in which they run.

    Each is re-fitted to its dense outputs y from its present inputs x' and, as these are of few calls, from the inputs
    that the dense denoiser has where nothing else is gone; ρ weighs the latter:

        E|g (w x' + b) − y|² / E[g²] + ρ E|w x_K + b − w0 x|² + λ |w − w0_K|²

    over w and b, with K the inputs that stay. g is the gate between layer and stream, 1 if there is none, and where a
    stream is known, y makes up for what it has lost (sequential). aims: of the dense denoiser. helping: of
    gated_layers; some may be behind the units. Norms between the units and the layers behind are re-fitted first. All
    of these numbers are the same whether units are removed or zeroed.
    """
    planned = [group for group in groups if group.name in plan]
    layers = {**helping, **column_layers(planned)}
    norms = {name: (group, norm) for group in planned for name, norm in _norms(group).items()}
    dense = {name: moments.wide(as_rows(layer).detach()[0].clone()) for name, layer in layers.items()}
    # An attention without heads is still there when its output bias is re-fitted.
    emptied = {name: keep for name, keep in plan.items() if not keep}
    first = {name: keep for name, keep in plan.items() if keep}
    kept = {**{name: torch.arange(layer.weight[0].numel()) for name, layer in helping.items()},
            **kept_columns(groups, plan)}
    there = {} if mask_only else kept_columns(groups, first)  # the inputs that the layers have while they are re-fitted
    surgery.carry_out(denoiser, groups, first, mask_only)
    surgery.carry_out(denoiser, groups, emptied, mask_only=True)
    if not mask_only:
        aims = aims._replace(outputs={**aims.outputs, **{name: aims.outputs[name][..., plan[group.name]]
                                                         for name, (group, _) in norms.items()}})

    def solve(name: str, layer: nn.Module, x: Tensor, y: Tensor, gate: Optional[Tensor]) -> None:
        keep = kept[name].to(x.device)
        places = torch.searchsorted(there[name].to(x.device), keep) if name in there else keep
        x = x[0][:, places]  # zeroed inputs are left out
        matrix, mean = gathered.of(name, x.device)
        weight, bias = refitting.refit_columns(dense[name].to(x.device), keep, x, y[0], matrix[0], mean[0],
                                               layer.bias is not None, sequential.PRIOR,
                                               None if gate is None else gate[0])
        whole = weight.new_zeros(len(weight), layer.weight[0].numel()).index_copy_(1, places, weight)
        layer.weight.copy_(whole.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.add_(bias)

    sequential.in_order(denoiser, layers, aims, solve, calibration,
                        {name: denoiser.get_submodule(name) for name in norms})
    if emptied and not mask_only:
        units = {name.rpartition(".")[2] for name in emptied}
        surgery.carry_out(denoiser, surgery.find_groups(denoiser, units)[0], emptied, mask_only=False)


def _norms(group: Group) -> Dict[str, nn.Module]:
    """Return the group norms over the units, whose statistics the units that are gone had a part in."""
    layers = dict(group.module.named_modules())
    return {group.path(path): layers[path] for path in group.kind.follows
            if isinstance(layers.get(path), nn.GroupNorm)}
