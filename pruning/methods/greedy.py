"""The order in which units go: each time the one whose loss is least, given those that are gone.

A unit owns some inputs of a layer with weight W (rows, d) and input moments H = E[x xᵀ]. If the inputs S go and the
others take over as well as they can, the layer's output loses (Hassibi & Stork, 1992, eq. 5, for blocks)

    tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ),   W ← W − W_S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,   H⁻¹ ← H⁻¹ − (H⁻¹)_S ᵀ [(H⁻¹)_SS]⁻¹ (H⁻¹)_S

Only M = H⁻¹ and K = Wᵀ W are needed. Both are updated in blocks of PENDING inputs, as matrix products; until then the
rows that are asked for are corrected one by one. So the order is exact, and as fast as the products.
"""
from __future__ import annotations

from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from pruning.methods import refit

DAMPING = 3e-3  # of the mean of H's diagonal
PENDING = 128  # inputs whose removal waits to be applied to the whole matrices


class Columns(NamedTuple):
    """The layer behind some units: each unit owns `size` adjacent inputs of it."""

    weight: Tensor  # W, (rows, d)
    moments: Tensor  # H, (d, d)
    first: int  # the first input that belongs to a unit
    size: int


@torch.no_grad()
def order(layers: Sequence[Columns], units: int, norm_groups: int = 1,
          weights: Optional[Sequence[float]] = None) -> Tuple[List[int], List[List[float]]]:
    """Return the units in the order in which they go, and after each the loss of each layer, a share of its energy.

    layers: all that are behind the units. weights: of their losses in the sum that decides; None: all 1.
    norm_groups: these lose units in turn, so that equally many are gone after every round.
    """
    states, weights = [_State(each, units) for each in layers], weights or [1.0] * len(layers)
    gone, totals, taken, losses = torch.zeros(units, dtype=torch.bool), [0.0] * len(layers), [], []
    gone_of_group = torch.zeros(norm_groups, dtype=torch.long)
    group_of = torch.arange(units) // (units // norm_groups)
    for _ in range(units):
        each = [state.losses() for state in states]
        loss = sum(weight * own for weight, own in zip(weights, each))
        closed = gone | (gone_of_group > gone_of_group.min())[group_of]
        unit = int(loss.masked_fill(closed.to(loss.device), float("inf")).argmin())
        totals = [min(total + max(float(own[unit]), 0.0), 1.0) for total, own in zip(totals, each)]
        for state in states:
            state.remove(unit)
        gone[unit] = True
        gone_of_group[group_of[unit]] += 1
        taken.append(unit)
        losses.append(totals)
    return taken, losses


@torch.no_grad()
def change_without(layer: Columns, gone: Iterable[int]) -> Tensor:
    """Return by how much the weight changes if the units `gone` go and the rest takes over, (rows, d) float32."""
    stays = torch.ones(len(layer.moments), dtype=torch.bool)
    for unit in gone:
        stays[layer.first + unit * layer.size:layer.first + (unit + 1) * layer.size] = False
    keep = stays.nonzero().flatten().to(layer.weight.device)
    weight, damped = layer.weight.double(), layer.moments.double().clone()
    refit.add_damping(damped, DAMPING)
    change = -weight
    factor = torch.linalg.cholesky(damped[keep][:, keep])
    change[:, keep] += torch.cholesky_solve((weight @ damped[:, keep]).T, factor).T
    return change.float()


class _State:
    """M = H⁻¹ and K = Wᵀ W of a layer while its units go one after the other."""

    def __init__(self, layer: Columns, units: int):
        d = len(layer.moments)
        dtype = torch.float64 if d <= refit.DOUBLE else torch.float32
        moments = layer.moments.to(dtype)
        weight = layer.weight.to(dtype)
        self.energy = float(((weight @ moments) * weight).sum().clamp_min(1e-30))
        damped = moments.clone()
        refit.add_damping(damped, DAMPING)
        self.inverse, self.gram = torch.cholesky_inverse(torch.linalg.cholesky(damped)), weight.T @ weight
        self.first, self.size, self.units = layer.first, layer.size, units
        self.of_inverse, self.of_gram = self._blocks(self.inverse), self._blocks(self.gram)
        # What waits: M −= leftᵀ right, and K −= rightᵀ change + changeᵀ right, of `waiting` inputs.
        self.left, self.right, self.change = (torch.zeros(PENDING + self.size, d, dtype=dtype, device=moments.device)
                                              for _ in range(3))
        self.waiting = 0

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Return each unit's own block of a (d, d) matrix, (units, size, size)."""
        end = self.first + self.units * self.size
        own = matrix[self.first:end, self.first:end].reshape(self.units, self.size, self.units, self.size)
        return own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def losses(self) -> Tensor:
        """Return the relative loss of removing each unit next, (units,); of those that are gone, anything."""
        if self.size == 1:
            return (self.of_gram / self.of_inverse).flatten() / self.energy
        return torch.linalg.solve_ex(self.of_inverse, self.of_gram)[0].diagonal(dim1=1, dim2=2).sum(1) / self.energy

    def remove(self, unit: int) -> None:
        """Take a unit out: its inputs are 0 in M from now on."""
        start = self.first + unit * self.size
        own = slice(start, start + self.size)
        left, right, change = (each[:self.waiting] for each in (self.left, self.right, self.change))
        inverse_rows = self.inverse[own] - left[:, own].T @ right
        gram_rows = self.gram[own] - right[:, own].T @ change - change[:, own].T @ right
        right = torch.linalg.solve(inverse_rows[:, own], inverse_rows)
        change = gram_rows - gram_rows[:, own] @ right / 2
        self._correct_blocks(inverse_rows, right, change)
        # What is gone stays 0 whatever rounding does, and 1 in M keeps its block solvable.
        self.of_inverse[unit] = torch.eye(self.size, dtype=right.dtype, device=right.device)
        for waiting, rows in ((self.left, inverse_rows), (self.right, right), (self.change, change)):
            waiting[self.waiting:self.waiting + self.size] = rows
        self.waiting += self.size
        if self.waiting >= PENDING:
            self._apply()

    def _correct_blocks(self, left: Tensor, right: Tensor, change: Tensor) -> None:
        end = self.first + self.units * self.size
        left, right, change = (each[:, self.first:end].reshape(self.size, self.units, self.size).transpose(0, 1)
                               for each in (left, right, change))
        self.of_inverse -= left.transpose(1, 2) @ right
        product = right.transpose(1, 2) @ change
        self.of_gram -= product + product.transpose(1, 2)

    def _apply(self) -> None:
        left, right, change = (each[:self.waiting] for each in (self.left, self.right, self.change))
        self.inverse.addmm_(left.T, right, alpha=-1)
        self.gram.addmm_(right.T, change, alpha=-1).addmm_(change.T, right, alpha=-1)
        self.waiting = 0
