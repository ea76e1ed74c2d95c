"""The steps that methods which zero weights share: allocate, choose, re-fit.

Such a method is a solver, solve(name, layer, counts): what becomes of a layer that loses as many weights as each of the
ascending counts says. It yields (weight, zeros) for each: `weight` is float32 and `zeros` a mask, both of the shape of
the layer's weight. `by_score` makes a solver of a score. A layer's weight is viewed as (groups, rows, d), see
moments.py.
"""
from __future__ import annotations

import math
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import Pruned, allocation, moments, pattern_of, probes, refit, sequential, zeroing
from pruning.methods.calibration import Calibration
from pruning.methods.moments import Moments, as_rows
from pruning.progress import tqdm

Solve = Callable[[str, nn.Module, Sequence[int]], Iterator[Tuple[Tensor, Tensor]]]

CURVE = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)  # rates at which a layer's error is measured
REFERENCE_RATE = 0.7  # at which layers are pruned to probe their sensitivity
SURVEYED = ("refit", "scope", "step_weights")  # options that decide what a solver does without a pattern


class Survey(NamedTuple):
    """What calibration says of each layer: name of the weight -> value."""

    curves: Dict[str, List[float]]  # relative output error at 0 and the rates of CURVE, rows weighted by γ
    sensitivities: Dict[str, float]  # relative change of the guided output, squared, if the layer's output is lost


def prune(method: str, denoiser: nn.Module, rate: float, solve: Solve, counts: Dict[str, int],
          calibration: Optional[Calibration], gathered: Optional[Moments], *, pattern: Optional[str] = None,
          refit_in_order: bool = False) -> Pruned:
    """Zero weights layer by layer, in place, and give the others what the solver says.

    counts: how many weights each layer loses. gathered: moments, from which each layer's error is reported.
    refit_in_order: whether each layer is then re-fitted to what reaches it in the pruned denoiser.
    """
    layers = moments.prunable_layers(denoiser)
    aims = sequential.dense_outputs(denoiser, layers, calibration) if refit_in_order else None
    faults = {name: pattern_fault(layer, pattern) for name, layer in layers.items()} if pattern else {}
    errors = {}
    for name, layer in tqdm(layers.items(), desc="layers", unit="layer", leave=False, delay=2):
        if faults.get(name):
            continue  # not even a zero of it changes
        weight, zeros = next(solve(name, layer, [counts[name]]))
        if gathered is not None:
            matrix, _ = gathered.of(name, layer.weight.device)
            errors[name] = refit.output_error(as_rows(layer).detach().float(), as_rows(layer, weight), matrix)
        with torch.no_grad():
            layer.weight.copy_(weight)
        zeroing.restore_zeros({name: layer.weight}, {name: zeros})
    if aims is not None:
        sequential.refit_in_order(denoiser, layers, aims, gathered, calibration)
    weights = {name: layer.weight for name, layer in layers.items()}
    pruned = zeroing.report(denoiser, weights, rate, method, errors)
    faults = {name: why for name, why in faults.items() if why}
    return pruned._replace(skipped_modules={**pruned.skipped_modules, **faults},
                           reached={name: count for name, count in pruned.reached.items() if name not in faults})


def prune_by_score(method: str, denoiser: nn.Module, rate: float, score: zeroing.Score,
                   calibration: Optional[Calibration], gathered: Optional[Moments] = None, *, scope: str,
                   pattern: Optional[str], refit: bool, allocation: str) -> Pruned:
    """Zero the weights of lowest score, in place. The options are those of METHODS; rate 0 changes nothing.

    gathered: moments, if the score needs them. Raises UserError if the denoiser has no prunable weights, if a score is
    NaN or -inf, and for what check_pattern and the calibration name.
    """
    weights = zeroing.prunable_weights(denoiser)
    if gathered is None and rate and (refit or allocation == "guided"):
        gathered = moments.gather(denoiser, calibration)
    if rate == 0 or (gathered is None and pattern is None):  # in place, in little memory
        zeroing.zero_lowest(weights, rate, score, scope)
        return zeroing.report(denoiser, weights, rate, method)
    zeroing.check_scores(weights, score)
    check_pattern(denoiser, pattern)
    solve = by_score(score, scope, pattern, gathered if refit else None)
    if allocation == "guided":
        counts = guided_counts(denoiser, rate, solve, calibration, survey_key(method, scope=scope, refit=refit))
    elif scope == "global":
        counts = zeroing.global_counts(weights, rate, score)
    else:
        counts = uniform_counts(weights, rate)
    return prune(method, denoiser, rate, solve, counts, calibration, gathered, pattern=pattern)


def by_score(score: zeroing.Score, scope: str, pattern: Optional[str], gathered: Optional[Moments]) -> Solve:
    """Return a solver that zeroes the weights of lowest score and re-fits the others if moments are given."""
    def solve(name, layer, counts):
        dense, shape = as_rows(layer).detach().float(), layer.weight.shape
        scores = as_rows(layer, score(layer.weight.detach().float(), name)).masked_fill(dense == 0, -math.inf)
        for count in counts:
            zeros = pattern_zeros(layer, scores, pattern) if pattern else zeroing.lowest(scores, count, scope)
            if gathered is None:
                weight = dense * ~zeros
            else:
                weight = refit.least_squares(dense, ~zeros, gathered.of(name, dense.device)[0])
            yield weight.reshape(shape), zeros.reshape(shape)
    return solve


# ---- which layer loses how many weights

def uniform_counts(weights: Dict[str, Tensor], rate: float) -> Dict[str, int]:
    """Return how many weights each layer loses: the same share, in sum round(rate * n)."""
    return dict(zip(weights, zeroing.layer_counts(list(weights.values()), rate)))


def guided_counts(denoiser: nn.Module, rate: float, solve: Solve, calibration: Calibration,
                  key: str) -> Dict[str, int]:
    """Return how many weights each layer loses so that the guided output changes least, in sum round(rate * n).

    key: see survey_key.
    """
    layers = moments.prunable_layers(denoiser)
    survey = survey_layers(denoiser, layers, solve, calibration, key)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    zeros = {name: zeroing.count_zeros(layer.weight) for name, layer in layers.items()}
    return allocation.least_change(sizes, (0.0, *CURVE), survey.curves, survey.sensitivities, rate, zeros)


def survey_key(method: str, **options) -> str:
    """Return the name of a survey: the method and those of its options that decide what its solver does."""
    return " ".join([f"survey of {method}", *(f"{name}={options[name]}" for name in SURVEYED if name in options)])


def survey_layers(denoiser: nn.Module, layers: Dict[str, nn.Module], solve: Solve, calibration: Calibration,
                  key: str) -> Survey:
    """Measure each layer's error curve, and probe how much the guided output depends on the layer. Once for all rates.

    key: see survey_key.
    """
    found = calibration.keep(key, lambda: _survey(denoiser, layers, solve, calibration))
    return Survey({name: found[f"{name} curve"].tolist() for name in layers},
                  {name: found[f"{name} sensitivity"].item() for name in layers})


def _survey(denoiser, layers, solve: Solve, calibration: Calibration) -> Dict[str, Tensor]:
    gathered = moments.gather(denoiser, calibration)
    energies = row_energies(denoiser, layers, calibration)
    found, changes = {}, {}
    for name, layer in tqdm(layers.items(), desc="error curves", unit="layer", leave=False):
        dense, (matrix, _) = as_rows(layer).detach().float(), gathered.of(name, layer.weight.device)
        rows, curve = energies[name].to(dense.device).view(dense.shape[:2]), [0.0]
        counts = [round(rate * layer.weight.numel()) for rate in CURVE]
        for rate, (weight, _) in zip(CURVE, solve(name, layer, counts)):
            curve.append(refit.output_error(dense, as_rows(layer, weight), matrix, rows))
            if rate == REFERENCE_RATE:
                changes[name] = (weight - layer.weight.detach().float()).to(layer.weight.dtype)
        found[f"{name} curve"] = torch.tensor(curve, dtype=torch.float64)
    calls = probes.probed_calls(calibration.calls)
    measured = probes.sensitivities(denoiser, calls, calibration.guidance, layers, changes, calibration.seed)
    energy = sum(probes.guided(output.float(), calibration.guidance).square().mean().item() for _, output in calls)
    for name, value in measured.items():
        error = found[f"{name} curve"][1 + CURVE.index(REFERENCE_RATE)].item()
        share = value / max(error, 1e-12) / max(energy / len(calls), 1e-30)
        found[f"{name} sensitivity"] = torch.tensor(share, dtype=torch.float64)
    return found


def row_energies(denoiser: nn.Module, layers: Dict[str, nn.Module], calibration: Calibration) -> Dict[str, Tensor]:
    """Return γ of each layer, (rows,) float32 on the CPU: how much the guided output depends on each row."""
    def compute():
        calls = probes.probed_calls(calibration.calls)
        found = probes.row_energies(denoiser, calls, calibration.guidance, layers, calibration.seed)
        return {name: energy.cpu() for name, energy in found.items()}
    return calibration.keep("row energies", compute)


# ---- patterns: exactly n of every m weights along the input channels are zero

def check_pattern(denoiser: nn.Module, pattern: Optional[str]) -> None:
    """Raise UserError if no layer of the denoiser can have the pattern."""
    layers = moments.prunable_layers(denoiser)
    if pattern and all(pattern_fault(layer, pattern) for layer in layers.values()):
        raise UserError(f"no layer of {type(denoiser).__name__} has input channels in multiples of "
                        f"{pattern_of(pattern)[1]}, so none can have a {pattern} pattern; prune without --pattern")


def pattern_fault(layer: nn.Module, pattern: str) -> Optional[str]:
    """Return why the layer cannot have the pattern, or None if it can."""
    channels, every = layer.weight.shape[1], pattern_of(pattern)[1]
    return None if channels % every == 0 else f"{channels} input channels are no multiple of {every}"


def pattern_zeros(layer: nn.Module, scores: Tensor, pattern: str, stay: Optional[int] = None) -> Tensor:
    """Return a mask of the lowest scores of each group of m input channels, as (groups, rows, d).

    A kernel's places are apart: a group is m input channels at one place. stay: how many of each m stay instead of n.
    """
    final, every = pattern_of(pattern)
    stay = final if stay is None else stay
    channels = layer.weight.shape[1]
    blocks = scores.reshape(*scores.shape[:2], channels // every, every, -1)  # (groups, rows, blocks, m, places)
    lowest = blocks.argsort(dim=3, stable=True)[..., :every - stay, :]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter(3, lowest, True).reshape(scores.shape)
