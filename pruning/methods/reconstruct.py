"""Zero weights where the guided output feels it least, and re-fit the others to the dense outputs.

Score: w² · E[x²] · γ, what a weight adds to its row's output (Sun et al., 2024, eq. 1, squared), times how much the
denoiser's guided output depends on the row (probes.row_energies). Layer rates: the least sum of s · e(rate), with e the
layer's relative output error after the re-fit and s the guided output's sensitivity to the layer (probes). The weights
that stay: masked least squares (refit).
"""
from __future__ import annotations

from functools import partial
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning import UserError
from pruning.methods import Pruned, moments, probes, recovery, refit, zeroing
from pruning.methods.calibration import Calibration

CURVE = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)  # rates at which a layer's error is measured
REFERENCE_RATE = 0.7  # at which layers are pruned to probe their sensitivity
ROW_SHARE = 0.015  # of each row stays: a row without weights is a constant
HEADROOM = 0.6  # a layer loses at most rate + HEADROOM · (1 − rate): errors of layers do not add up near 1


class Survey(NamedTuple):
    """What calibration says of each layer: name of the weight -> value."""

    moments: Dict[str, Tensor]  # H, (groups, d, d)
    energies: Dict[str, Tensor]  # γ, (rows,)
    curves: Dict[str, List[float]]  # relative output error after the re-fit, at 0 and the rates of CURVE
    sensitivities: Dict[str, float]  # of the guided output, squared, if the layer loses all its output


def prune(denoiser: nn.Module, rate: float, *, calibration: Optional[Calibration] = None) -> Pruned:
    """Zero round(rate * n) of all n prunable weights in place, and re-fit the others. Rate 0 changes nothing.

    Raises UserError if there are no calls to calibrate on, or if calls or weights are not finite.
    """
    layers = moments.prunable_layers(denoiser)
    if rate > 0:
        if calibration is None or not calibration.calls:
            raise UserError("reconstruct needs recorded calls of the dense denoiser")
        survey = calibration.once("reconstruct", partial(survey_layers, denoiser, layers, calibration))
        counts = allocate(layers, survey, rate)
        for name, layer in tqdm(layers.items(), desc="re-fit", unit="layer", leave=False, delay=2):
            weight, zeros = refitted(layer, survey, name, counts[name])
            with torch.no_grad():
                layer.weight.copy_(weight)
            recovery.restore_zeros({name: layer.weight}, {name: zeros})
    return zeroing.report(denoiser, {name: layer.weight for name, layer in layers.items()}, rate, "reconstruct")


def survey_layers(denoiser: nn.Module, layers: Dict[str, nn.Module], calibration: Calibration) -> Survey:
    """Calibrate: gather moments, probe rows, measure each layer's error curve, and probe the layers."""
    calls, seed, guidance = calibration.calls, calibration.seed, calibration.guidance
    with tqdm(total=len(calls), desc="input moments", unit="call", leave=False) as bar:
        gathered = moments.input_moments(denoiser, calls, layers, seed, bar=bar)
    probed = probes.probed_calls(calls)
    energies = probes.row_energies(denoiser, probed, guidance, layers, seed)
    survey = Survey(gathered, energies, {}, {})
    changes = {}
    for name, layer in tqdm(layers.items(), desc="error curves", unit="layer", leave=False):
        dense = moments.as_rows(layer).detach().float()
        rows = energies[name].view(dense.shape[:2])
        survey.curves[name] = [0.0]
        for rate in CURVE:
            weight, _ = refitted(layer, survey, name, round(rate * layer.weight.numel()))
            survey.curves[name].append(refit.output_error(dense, moments.as_rows(layer, weight), gathered[name], rows))
            if rate == REFERENCE_RATE:
                changes[name] = (weight - layer.weight.detach().float()).to(layer.weight.dtype)
    measured = probes.sensitivities(denoiser, probed, guidance, layers, changes, seed)
    reference = CURVE.index(REFERENCE_RATE) + 1
    survey.sensitivities.update({name: value / max(survey.curves[name][reference], 1e-12)
                                 for name, value in measured.items()})
    return survey


def refitted(layer: nn.Module, survey: Survey, name: str, count: int) -> Tuple[Tensor, Tensor]:
    """Zero the layer's `count` weights of lowest score and re-fit the others.

    Returns the weight, float32, and the mask of its zeros, both of the weight's shape.
    """
    dense, shape = moments.as_rows(layer).detach().float(), layer.weight.shape
    if count == 0:
        return dense.reshape(shape), dense.reshape(shape) == 0
    matrix = survey.moments[name]
    score = dense.square() * matrix.diagonal(dim1=1, dim2=2)[:, None] * survey.energies[name].view(*dense.shape[:2], 1)
    zeros = lowest(score, dense.abs(), count)
    return refit.least_squares(dense, ~zeros, matrix).reshape(shape), zeros.reshape(shape)


def lowest(score: Tensor, magnitude: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` lowest scores, (groups, rows, d), that leaves ROW_SHARE of each row if possible.

    Of equal scores, those of lower magnitude go first, so that inputs that never vary lose their small weights.
    """
    row = score.shape[-1]
    stays = max(1, round(ROW_SHARE * row))
    order = score + magnitude.square() * (score.max() * 1e-12 / magnitude.square().max().clamp_min(1e-30))
    if count <= score.numel() - stays * score.shape[0] * score.shape[1]:
        top = order.topk(stays, dim=-1).indices
        order = order.scatter(-1, top, float("inf"))
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order.flatten().topk(count, largest=False).indices] = True
    return mask.view(score.shape)


def allocate(layers: Dict[str, nn.Module], survey: Survey, rate: float) -> Dict[str, int]:
    """Return how many weights each layer loses, in sum round(rate * n): the least sum of sensitivity · error.

    The multiplier λ is the price of a weight. At each price a layer takes the rate with the least s · e + λ · weights
    left, and bisection finds the price at which all layers together lose enough.
    """
    names, sizes = list(layers), [layer.weight.numel() for layer in layers.values()]
    total = round(rate * sum(sizes))
    cap = rate + HEADROOM * (1 - rate)
    grid = torch.linspace(0, 1, 501).double()[: int(500 * cap) + 1]
    knots = torch.tensor([0.0, *CURVE, 1.0]).double()
    costs = []
    for name in names:
        errors = torch.tensor([*survey.curves[name], 1.0]).double().clamp(1e-9, 1.0).cummax(0).values
        at = torch.searchsorted(knots, grid, right=True).clamp(1, len(knots) - 1)
        share = (grid - knots[at - 1]) / (knots[at] - knots[at - 1])
        logs = errors.log()
        costs.append(survey.sensitivities[name] * (logs[at - 1] + share * (logs[at] - logs[at - 1])).exp())
    costs, numels = torch.stack(costs), torch.tensor(sizes).double()[:, None]

    def counts_at(price: float) -> List[int]:
        chosen = grid[(costs - price * numels * grid).argmin(1)]
        return [int(each * size) for each, size in zip(chosen.tolist(), sizes)]

    low, high = -60.0, 60.0  # natural logarithms of the price
    for _ in range(80):
        middle = (low + high) / 2
        if sum(counts_at(torch.tensor(middle).double().exp().item())) < total:
            low = middle
        else:
            high = middle
    below, above = (counts_at(torch.tensor(end).double().exp().item()) for end in (low, high))
    missing = total - sum(below)
    counts = {}
    for name, least, most in zip(names, below, above):  # from the one solution to the other, to the weight
        most = max(most, least)
        counts[name] = least + min(max(missing, 0), most - least)
        missing -= counts[name] - least
    for name, size in sorted(zip(names, sizes), key=lambda pair: -pair[1]):  # caps round down
        more = min(max(missing, 0), size - counts[name])
        counts[name] += more
        missing -= more
    return counts
