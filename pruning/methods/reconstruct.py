"""Zero weights where the guided output feels it least, and re-fit the others to the dense outputs.

Score: w² · E[x²] · γ, what a weight adds to its row's output (Sun et al., 2024, eq. 1, squared), times how much the
denoiser's guided output depends on the row (probes.row_energies). Layer rates: the least sum of s · e(rate), with e the
layer's relative output error after the re-fit and s the guided output's sensitivity to the layer (probes). The weights
that stay: masked least squares (refit).
"""
from __future__ import annotations

import math
from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning.methods import Pruned, moments, pattern_of, refit, weights, zeroing
from pruning.methods.calibration import Calibration
from pruning.methods.moments import as_rows

ROW_SHARE = 0.015  # of each row stays: a row without weights is a constant
SHARE = 0.1  # of the weights that are left go in a step, and the next step's score knows the re-fit
SURVEY_SHARE = 0.15  # the same where only a layer's error is measured: allocation needs no more
ITERATIONS = 4  # of the re-fit after each step, from the weights before


def prune(denoiser: nn.Module, rate: float, *, pattern: Optional[str],
          calibration: Optional[Calibration] = None) -> Pruned:
    """Zero round(rate * n) of all n prunable weights in place, and re-fit the others. Rate 0 changes nothing.

    pattern: gives every layer the same rate. Raises UserError if calls or weights are not finite, or if no layer can
    have the pattern.
    """
    layers = moments.prunable_layers(denoiser)
    if rate == 0:
        return zeroing.report(denoiser, {name: layer.weight for name, layer in layers.items()}, rate, "reconstruct")
    weights.check_pattern(denoiser, pattern)
    gathered = moments.gather(denoiser, calibration)
    solve = solver(denoiser, gathered, calibration, pattern=pattern, share=SHARE)
    if pattern:
        counts = dict.fromkeys(layers, 0)
    else:
        surveyor = solver(denoiser, gathered, calibration)
        counts = weights.guided_counts(denoiser, rate, surveyor, calibration, weights.survey_key("reconstruct"))
    return weights.prune("reconstruct", denoiser, rate, solve, counts, calibration, gathered, pattern=pattern,
                         refit_in_order=True)


def solver(denoiser: nn.Module, gathered: moments.Moments, calibration: Calibration, *,
           pattern: Optional[str] = None, share: Optional[float] = None, **_) -> weights.Solve:
    """Return what becomes of a layer that loses some weights: step by step, with a re-fit after each.

    share: of the weights left that go in a step; None: SURVEY_SHARE.
    """
    share = SURVEY_SHARE if share is None else share
    energies = weights.row_energies(denoiser, moments.prunable_layers(denoiser), calibration)

    def solve(name: str, layer: nn.Module, counts: Sequence[int]) -> Iterator[Tuple[Tensor, Tensor]]:
        dense, shape = as_rows(layer).detach().float(), layer.weight.shape
        matrix, _ = gathered.of(name, dense.device)
        gain = matrix.diagonal(dim1=1, dim2=2)[:, None] * energies[name].to(dense.device).view(*dense.shape[:2], 1)
        matrix = refit.damped(matrix)
        weight, zeros, target = dense, dense == 0, dense @ matrix
        for step, wanted in pattern_steps(pattern) if pattern else steps(counts, dense.numel(), share):
            score = (weight.square() * gain).masked_fill(zeros, -1)  # zeros stay
            if pattern:
                zeros = weights.pattern_zeros(layer, score, pattern, step)
            else:
                zeros = zeros | lowest(score, weight.abs(), step)
            weight = refit.solve_rows(weight, ~zeros, matrix, target, ITERATIONS)
            if wanted:
                yield weight.reshape(shape), zeros.reshape(shape)
    return solve


def steps(counts: Sequence[int], total: int, share: float) -> Iterator[Tuple[int, bool]]:
    """Yield the zeros after each step, and whether they are one of `counts`. A step takes about `share` of the rest."""
    reached = 0
    for count in counts:
        left, stay = max(1, total - reached), max(1, total - count)
        number = max(1, math.ceil(math.log(left / stay) / -math.log(1 - share) - 1e-9))
        for step in range(1, number):
            yield total - round(left * (stay / left) ** (step / number)), False
        yield count, True
        reached = count


def pattern_steps(pattern: str) -> Iterator[Tuple[int, bool]]:
    """Yield how many of every m stay after each step, and whether these are n."""
    final, every = pattern_of(pattern)
    for stay in range(every - 1, final - 1, -1):
        yield stay, stay == final


def lowest(score: Tensor, magnitude: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` lowest scores, (groups, rows, d), that leaves ROW_SHARE of each row if possible.

    Of equal scores, those of lower magnitude go first, so that inputs that never vary lose their small weights. Scores
    below 0 are of weights that are zero already, which go before all others.
    """
    row = score.shape[-1]
    stays = max(1, round(ROW_SHARE * row))
    order = score + magnitude.square() * (score.max() * 1e-12 / magnitude.square().max().clamp_min(1e-30))
    if count <= score.numel() - stays * score.shape[0] * score.shape[1]:
        reserve = order.topk(stays, dim=-1, sorted=False).indices
        order = order.scatter(-1, reserve, float("inf")).masked_fill(score < 0, -1)
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order.flatten().topk(count, largest=False, sorted=False).indices] = True
    return mask.view(score.shape)
