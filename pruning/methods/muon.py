"""Muon, an optimizer for recovery: a step changes a matrix in all its directions alike (Jordan et al., 2024).

AdamW scales each weight's step for itself. Muon makes the momentum M of a whole matrix orthogonal, U Vᵀ of M = U S Vᵀ,
so that weak directions of M are learned as fast as strong ones. The same steps then bring back more of what a UNet has
lost (docs/methods.md, Recovery). Muon also holds one number a weight where AdamW holds two.
"""
from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor, nn

MATRIX_RATE = 0.01  # the largest singular value of a step, of a matrix that has no more rows than columns
VECTOR_RATE = 3e-4
MOMENTUM = 0.95  # of matrices
BETAS, EPSILON = (0.9, 0.99), 1e-8  # of Adam, for all that is no matrix
ITERATIONS, FACTORS = 5, (3.4445, -4.7750, 2.0315)  # Jordan et al., 2024: singular values end between 0.7 and 1.2


class Muon(torch.optim.Optimizer):
    """Trains matrices and kernels of convolutions, as rows of outputs, by Muon, and all else by Adam.

    The rates are in two groups, matrices first, for a scheduler to change. There is no weight decay.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        parameters = list(parameters)
        super().__init__([{"params": [each for each in parameters if each.dim() > 1], "lr": MATRIX_RATE},
                          {"params": [each for each in parameters if each.dim() < 2], "lr": VECTOR_RATE}], {})

    @torch.no_grad()
    def step(self) -> None:
        """Change all parameters that have a gradient."""
        for group, change in zip(self.param_groups, (self._matrix_step, self._vector_step)):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(change(self.state[parameter], parameter.grad), alpha=group["lr"])

    def _matrix_step(self, state: dict, gradient: Tensor) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        aim = (gradient + MOMENTUM * momentum).flatten(1)
        if aim.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            aim = aim.bfloat16()  # enough for the iteration (Jordan et al., 2024), and faster
        change = orthogonal(aim).to(gradient.dtype)
        # So a step changes outputs as much whatever the sizes of the layer are, and one rate suits all models.
        return change.mul_(max(1, len(change) / change.shape[1]) ** 0.5).view_as(gradient)

    def _vector_step(self, state: dict, gradient: Tensor) -> Tensor:
        if not state:
            state.update(count=0, first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
        state["count"] += 1
        first, second = (state[name].lerp_(value, 1 - beta) / (1 - beta ** state["count"]) for name, value, beta in zip(
            ("first", "second"), (gradient, gradient.square()), BETAS))
        return first / (second.sqrt() + EPSILON)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U Vᵀ of matrix = U S Vᵀ, in its dtype: singular values end near 1, by a Newton-Schulz iteration."""
    a, b, c = FACTORS
    tall = len(matrix) > matrix.shape[1]
    matrix = (matrix.T if tall else matrix) / matrix.norm().clamp_min(1e-30)
    for _ in range(ITERATIONS):
        square = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(square, square, square, beta=b, alpha=c), matrix, beta=a)
    return matrix.T if tall else matrix


def held_bytes(model: nn.Module) -> int:
    """Return the bytes that training a model holds from step to step."""
    return sum(parameter.numel() * (4 if parameter.dim() > 1 else 8) for parameter in model.parameters())


def step_bytes(model: nn.Module) -> int:
    """Return the most bytes that a step takes beside that: about four matrices as large as the largest."""
    return 4 * 4 * max(parameter.numel() for parameter in model.parameters())
