"""Masked least squares: new values for the weights that stay, so that a layer's outputs come back.

With W0 the dense weight (rows, d), H = E[x xᵀ] the second moments of the layer's inputs (moments.py), and S the inputs
that a row keeps, each row w minimises the error of the layer's output on calibration inputs and stays near w0:

    (w − w0) H (w − w0)ᵀ + λ |w − w0|²   over w with zeros outside S,   λ = damping · mean(diag H)

The solution has w_S (H + λI)_SS = (w0 (H + λI))_S. Each row has an S of its own, so an exact solve would factor one
matrix a row. Instead all rows are solved together, by conjugate gradients with the diagonal as preconditioner.
"""
from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of H's diagonal: inputs that hardly vary make H singular
ITERATIONS = 12  # 5 reach nearly the same error, 30 gain nothing
DOUBLE = 4096  # inputs up to which whole matrices are factored in float64
GATED_ITERATIONS = 6  # the error then is within 1e-9 of the least
BLOCK = 1 << 24  # weights solved together, which bounds the temporaries


def damped(moments: Tensor) -> Tensor:
    """Return H + λI of moments (groups, d, d), in float32."""
    matrix = moments.float().clone()
    add_damping(matrix)
    return matrix


def add_damping(matrix: Tensor, share: float = DAMPING) -> Tensor:
    """Add λ to the diagonal of a matrix (..., d, d), in place, and return λ, (..., 1, 1).

    share: λ ÷ mean of the diagonal. λ is never 0, so that a layer without input is no error.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    damping = share * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    diagonal += damping
    return damping[..., None]


@torch.no_grad()
def refit_columns(dense: Tensor, keep: Tensor, x: Tensor, y: Tensor, moments: Tensor, mean: Tensor, with_bias: bool,
                  prior: float, gate: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Return w (rows, |K|) and the change b (rows,) of the bias, 0 without bias, for a layer that keeps the inputs K.

    Each row minimises E|g (w x + b) − y|² / E[g²] + ρ E|w z_K + b − w0 z|² + λ |w − w0_K|², where z are the dense
    inputs.

    dense: w0, (rows, d). keep: K, indices. x: present inputs, (n, |K|). y: what to reach, (n, rows). moments, mean:
    E[z zᵀ] and E[z]. prior: ρ. gate: g, (n, rows); None if it is 1.
    """
    dtype = torch.float64 if len(keep) <= DOUBLE else torch.float32
    dense, x, y, moments, mean = (each.to(dtype) for each in (dense, x, y, moments, mean))
    start, gone = dense[:, keep], dense.index_fill(1, keep, 0)
    outputs, squares = x @ start.T, None
    # What is solved for is the change of the weight, whose rounding errors are smaller.
    if gate is None:
        lacking = y - outputs
    else:
        gate = gate.to(dtype)
        size = gate.square().mean(0).sqrt().clamp_min(torch.finfo(dtype).tiny ** 0.25)
        squares, lacking = (gate / size).square(), (y - gate * outputs) * gate / size ** 2
    matrix, behind = prior * moments[keep][:, keep], prior * gone @ moments[:, keep]  # what ρ and λ ask for
    matrix.diagonal().add_(add_damping(x.T @ x / len(x) + matrix).flatten())
    if with_bias:  # the weight of a constant input 1, which is not damped
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        column = prior * mean[keep][:, None]
        matrix = torch.cat([torch.cat([matrix, column], 1), torch.cat([column.T, column.new_full((1, 1), prior)], 1)])
        behind = torch.cat([behind, prior * (gone @ mean)[:, None]], 1)
    change = _solve_gated(x, squares, matrix, lacking.T @ x / len(x) + behind)
    return start + change[:, :len(keep)], change[:, -1] if with_bias else change.new_zeros(len(dense))


def _solve_gated(x: Tensor, squares: Optional[Tensor], matrix: Tensor, target: Tensor) -> Tensor:
    """Solve w (E[g² x xᵀ] + M) = b for each row, whose g² differ, by conjugate gradients, all rows at once.

    The matrix without g² is the preconditioner: as the g² of a row are 1 on average, few steps are enough.

    x: (n, d). squares: g², (n, rows); None if they are 1. matrix: M, (d, d). target: b, (rows, d).
    """
    factor = torch.linalg.cholesky(x.T @ x / len(x) + matrix)
    weight = torch.cholesky_solve(target.T, factor).T
    if squares is None:
        return weight

    def image(rows: Tensor) -> Tensor:
        return ((rows @ x.T) * squares.T) @ x / len(x) + rows @ matrix

    residual = target - image(weight)
    step = direction = torch.cholesky_solve(residual.T, factor).T
    norm = (residual * step).sum(1, keepdim=True)
    for _ in range(GATED_ITERATIONS):
        change = image(direction)
        length = norm / (direction * change).sum(1, keepdim=True).clamp_min(1e-30)
        weight = weight + length * direction
        residual = residual - length * change
        step = torch.cholesky_solve(residual.T, factor).T
        before, norm = norm, (residual * step).sum(1, keepdim=True)
        direction = step + norm / before.clamp_min(1e-30) * direction
    return weight


@torch.no_grad()
def refit_norm(norm: torch.nn.Module, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Re-fit scale and shift of a norm, in place, channel by channel, and return what its output becomes.

    output: (batch, channels, ...), what the norm has given. x: some places of it, (n, channels). y: what it is to give
    there. Channels that do not vary stay as they are.
    """
    mean, aim = x.mean(0), y.mean(0)
    variance = (x - mean).square().mean(0)
    varies = variance > 1e-12 * variance.max().clamp_min(1e-30)
    scale = torch.where(varies, ((x - mean) * (y - aim)).mean(0) / variance.clamp_min(1e-30), 1)
    shift = torch.where(varies, aim - scale * mean, 0)
    norm.bias.copy_(norm.bias * scale + shift)
    norm.weight.copy_(norm.weight * scale)
    shape = (1, -1) + (1,) * (output.dim() - 2)
    return torch.addcmul(shift.view(shape), output.to(x.dtype), scale.view(shape)).to(output.dtype)


@torch.no_grad()
def least_squares(dense: Tensor, kept: Tensor, moments: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return the re-fitted weight: zeros where `kept` is False, and the least output error on the inputs of `moments`.

    dense: W0, (groups, rows, d) float32. kept: bool, of the same shape. moments: H, (groups, d, d).
    """
    matrix = damped(moments)
    return solve_rows(dense, kept, matrix, dense @ matrix, iterations)


@torch.no_grad()
def solve_rows(start: Tensor, kept: Tensor, matrix: Tensor, target: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return W with w_S M_SS = b_S for each row w and the inputs S that the row keeps, and zeros outside S.

    start, kept, target (b): (groups, rows, d). matrix: M, (groups, d, d), symmetric and positive definite.
    """
    rows = max(1, BLOCK // (start.shape[0] * start.shape[2]))
    blocks = zip(*(tensor.split(rows, 1) for tensor in (start, kept, target)))
    return torch.cat([_conjugate_gradients(*block, matrix, iterations) for block in blocks], 1)


def _conjugate_gradients(start: Tensor, kept: Tensor, target: Tensor, matrix: Tensor, iterations: int) -> Tensor:
    """Solve w_S M_SS = b_S for each row (Hestenes & Stiefel, 1952), all rows at once."""
    kept = kept.to(start.dtype)
    inverse = kept / matrix.diagonal(dim1=-2, dim2=-1)[:, None, :]  # the preconditioner, on S alone
    weight = start * kept
    residual = (target - weight @ matrix) * kept
    direction = residual * inverse
    norm = (residual * direction).sum(-1, keepdim=True)
    for _ in range(iterations):  # in place: for narrow layers, memory takes longer than the product
        image = (direction @ matrix).mul_(kept)
        length = norm / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
        weight.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        step = torch.mul(residual, inverse, out=image)
        before, norm = norm, (residual * step).sum(-1, keepdim=True)
        direction.mul_(norm / before.clamp_min(1e-30)).add_(step)
    return weight


def output_error(dense: Tensor, weight: Tensor, moments: Tensor, row_weights: Optional[Tensor] = None) -> float:
    """Return the share of the layer's output energy that is lost: Σ γ (w − w0) H (w − w0)ᵀ / Σ γ w0 H w0ᵀ.

    dense, weight: (groups, rows, d). moments: (groups, d, d). row_weights: γ, (groups, rows), 1 if None.
    """
    def energy(rows: Tensor) -> Tensor:
        each = ((rows @ moments) * rows).sum(-1)
        return (each if row_weights is None else each * row_weights).sum()
    whole = energy(dense)
    return float(energy(weight - dense) / whole) if whole > 0 else 0.0
