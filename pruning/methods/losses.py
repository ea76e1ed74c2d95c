"""What groups of units and bases of ranks can lose step by step: what it saves of a budget, and the error it makes.

See joint for the error. Everything here is computed for a dense denoiser, once for all rates.
"""
from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from pruning.methods import greedy, modulation, probes, surgery, units
from pruning.methods.allocation import most_of, scores_of, step_of
from pruning.methods.calibration import Calibration, answer
from pruning.methods.modulation import Basis
from pruning.methods.moments import Moments
from pruning.methods.surgery import Group
from pruning.progress import tqdm

FRACTIONS = (0.5, 1.0)  # of a group's units, in measurements
RANK_FRACTIONS = (0.75, 0.9, 0.97)  # of a basis' ranks
FEW = 4  # captions whose final latents judge a group


class Path(NamedTuple):
    """What a group of units, or a basis of ranks, can lose step by step; the lists start with no step."""

    step: int  # units that go together
    saved: List[float]  # of the budget
    shares: List[float]  # of the units that are gone
    errors: List[float]  # rising

    def priced(self, price: float) -> Path:
        """Return the path if each unit saves `price` of the budget."""
        return self._replace(saved=[price * self.step * k for k in range(len(self.errors))])


def step_size(denoiser: nn.Module, group: Group, round_to: int) -> int:
    """Return how many units of a group go together."""
    return 1 if group.kind.unit == "heads" else step_of(group, units.rounding(denoiser, round_to))


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
    return (scores_of(group, found.place) >= gone).nonzero().flatten().tolist()


def unit_paths(denoiser: nn.Module, groups: List[Group], found: units.Order, prices: Dict[str, float],
               gathered: Moments, calibration: Calibration, round_to: int) -> Dict[str, Path]:
    """Return the path of each group, by its name."""
    factors = latent_factors(denoiser, groups, found, gathered, calibration)
    paths = {}
    for group in groups:
        step = step_size(denoiser, group, round_to)
        counts = np.arange(0, most_of(group, step) + 1, step)
        share = counts / group.units
        lost = np.array([found.loss(group, count) for count in counts])
        latents = lost * interpolated(share, FRACTIONS, factors[group.name])
        probed = np.array([0.0, *found[group.name][2][counts[1:] - 1].tolist()])
        errors = np.maximum.accumulate(np.sqrt(latents * probed))
        paths[group.name] = Path(step, (prices[group.name] * counts).tolist(), share.tolist(), errors.tolist())
    return paths


def interpolated(share: np.ndarray, fractions: Tuple[float, ...], factors: Tensor) -> np.ndarray:
    """Return factors that were measured at fractions, at other shares; their logarithm is interpolated."""
    return np.exp(np.interp(share, fractions, factors.clamp_min(1e-12).log().numpy()))


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


def rank_paths(denoiser: nn.Module, known: Dict[str, Basis], calibration: Calibration) -> Dict[str, Path]:
    """Return the path of each basis, by its name; at least one rank stays."""
    def compute():
        dense, calls, factors = calibration.latents(denoiser, FEW), probes.probed_calls(calibration.calls), {}
        outputs = [guided(denoiser, call, calibration) for call in calls]
        for name, basis in known.items():
            latents, changes = [], []
            for fraction in RANK_FRACTIONS:
                rank = max(1, round((1 - fraction) * len(basis.mean)))
                with restored([denoiser.get_submodule(each) for each in basis.names]):
                    modulation.take(denoiser, basis, rank, mask_only=True)
                    latents.append(float((calibration.latents(denoiser, FEW) - dense).square().mean() / dense.var()))
                    changes.append(np.mean([float((guided(denoiser, call, calibration) - output).square().mean())
                                            for call, output in zip(calls, outputs)]))
                latents[-1] /= max(float(basis.lost[rank]), 1e-12)
                changes[-1] /= max(float(basis.lost[rank]), 1e-12)
            factors[f"{name} latents"] = torch.tensor(latents, dtype=torch.float64)
            factors[f"{name} changes"] = torch.tensor(changes, dtype=torch.float64)
        return factors

    factors, paths = calibration.keep("error of ranks", compute) if known else {}, {}
    for name, basis in known.items():
        shapes = [denoiser.get_submodule(each).weight.shape for each in basis.names]
        width = len(basis.mean)
        share = np.arange(width) / width
        lost = basis.lost.numpy()[width - np.arange(width)]
        errors = lost * np.sqrt(interpolated(share, RANK_FRACTIONS, factors[f"{name} latents"])
                                * interpolated(share, RANK_FRACTIONS, factors[f"{name} changes"]))
        errors[0] = 0.0
        paths[name] = Path(1, rank_savings(shapes), share.tolist(), np.maximum.accumulate(errors).tolist())
    return paths


def rank_savings(shapes: list) -> List[float]:
    """Return the parameters that layers, (rows, inputs), save after each rank that goes, but for the last."""
    width = shapes[0][1]
    return [0.0, *(rank_parameters(shapes, 0) - rank_parameters(shapes, width - k) for k in range(1, width))]


def rank_parameters(shapes: list, rank: int) -> float:
    """Return the parameters of layers, (rows, inputs), that share what they read in this rank; 0 is the dense rank."""
    rows, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
    return float(rank * (rows + inputs + 1) if rank else rows * inputs)


def guided(denoiser: nn.Module, call, calibration: Calibration) -> Tensor:
    """Return the guided output of a recorded call, float32."""
    with torch.no_grad():
        return probes.guided(answer(denoiser, call[0]), calibration.guidance).float()


@contextmanager
def one_pruned(group: Group, keep: List[int], gathered: Moments) -> Iterator[None]:
    """Inside the block, the units of a group that do not stay are zeroed and the layers behind them re-fitted."""
    gone = sorted(set(range(group.units)) - set(keep))
    with restored([part.layer for part in group.parts()]), torch.no_grad():
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
