"""SparseGPT: columns are zeroed in order, and each time the columns that follow are corrected.

Frantar & Alistarh (2023), arXiv:2301.00774, algorithm 1. step_weights weigh the calls in the moments, as OBS-Diff does
(Zhu et al., 2025).
"""
from __future__ import annotations

from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import Pruned, moments, pattern_of, refit, weights, zeroing
from pruning.methods.calibration import Calibration
from pruning.methods.moments import as_rows

BLOCK = 128  # columns whose mask is chosen together


def prune(denoiser: nn.Module, rate: float, *, pattern: Optional[str], allocation: str, step_weights: str,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Zero round(rate * n) of all n prunable weights, in place, and correct the others. Rate 0 changes nothing.

    Raises UserError if calls or weights are not finite, or if no layer can have the pattern.
    """
    layers = moments.prunable_layers(denoiser)
    dense = {name: layer.weight for name, layer in layers.items()}
    if rate == 0:
        return zeroing.report(denoiser, dense, rate, "sparsegpt")
    weights.check_pattern(denoiser, pattern)
    gathered = moments.gather(denoiser, calibration, step_weights)
    solve = solver(denoiser, gathered, calibration, pattern=pattern)
    if allocation == "guided":
        key = weights.survey_key("sparsegpt", step_weights=step_weights)
        counts = weights.guided_counts(denoiser, rate, solve, calibration, key)
    else:
        counts = weights.uniform_counts(dense, rate)
    return weights.prune("sparsegpt", denoiser, rate, solve, counts, calibration, gathered, pattern=pattern)


def solver(denoiser: nn.Module, gathered: moments.Moments, calibration: Calibration, *,
           pattern: Optional[str] = None, **_) -> weights.Solve:
    """Return what becomes of a layer that loses some weights. Raises UserError if a weight is not finite."""
    for name, layer in moments.prunable_layers(denoiser).items():
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"{name} has weights that are NaN or infinite; check the weights of the model")

    def solve(name: str, layer: nn.Module, counts: Sequence[int]) -> Iterator[Tuple[Tensor, Tensor]]:
        for count in counts:
            yield solve_layer(layer, gathered.of(name, layer.weight.device)[0], count, pattern)
    return solve


@torch.no_grad()
def solve_layer(layer: nn.Module, matrix: Tensor, count: int, pattern: Optional[str]) -> Tuple[Tensor, Tensor]:
    """Return the corrected weight, float32, and the mask of its zeros, both of the shape of the layer's weight.

    matrix: H, (groups, d, d). The places of a kernel stand before its input channels while columns are processed, so
    that a pattern's channels are neighbours.
    """
    dense = as_rows(layer).detach().float()
    groups, rows, d = dense.shape
    channels = layer.weight.shape[1]
    order = torch.arange(d, device=dense.device).view(channels, -1).T.flatten()
    weight, zeros = dense.clone(), torch.zeros_like(dense, dtype=torch.bool)
    for group in range(groups):
        before, after = (round(count * place / groups) for place in (group, group + 1))
        found = correct_columns(dense[group][:, order], refit.damped(matrix)[group][order][:, order], after - before,
                                pattern)
        weight[group][:, order], zeros[group][:, order] = found
    return weight.reshape(layer.weight.shape), zeros.reshape(layer.weight.shape)


def correct_columns(dense: Tensor, matrix: Tensor, count: int, pattern: Optional[str] = None) -> Tuple[Tensor, Tensor]:
    """Return the weight (rows, d) and the mask of its `count` zeros. matrix: H with damping, (d, d).

    With U the upper Cholesky factor of H⁻¹, the mask of a block of columns is that of the lowest w² / U_jj². Column j
    then has the error (w_j − q_j) / U_jj with q_j the weight that stays or 0, and the later columns lose error · U_j.
    """
    factor = inverse_factor(matrix)
    weight, zeros = dense.clone(), torch.zeros_like(dense, dtype=torch.bool)
    d = dense.shape[1]
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        block, own = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(block)
        if pattern is None:
            share = round(count * end / d) - round(count * start / d)
            mask = zeroing.lowest((block / own.diagonal()).square()[None], share)[0]
        else:
            stay, every = pattern_of(pattern)
            mask = torch.zeros_like(block, dtype=torch.bool)
        for column in range(end - start):
            if pattern is not None and column % every == 0:
                score = (block[:, column:column + every] / own.diagonal()[column:column + every]).square()
                lowest = score.argsort(dim=1, stable=True)[:, :every - stay]
                mask[:, column:column + every] = torch.zeros_like(score, dtype=torch.bool).scatter(1, lowest, True)
            error = block[:, column] * mask[:, column] / own[column, column]
            block[:, column:] -= error[:, None] * own[column, column:]
            errors[:, column] = error
        zeros[:, start:end] = mask
        weight[:, start:end] = block.masked_fill(mask, 0)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight, zeros


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return U, upper triangular, with Uᵀ U = H⁻¹. A matrix that float32 cannot factor is factored in float64."""
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(matrix.to(dtype))
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0:
                return upper.float()
    raise UserError("the input moments of a layer cannot be inverted; calibrate on more images")
