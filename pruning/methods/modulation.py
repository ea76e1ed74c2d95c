"""Give the AdaLN layers of a transformer a low rank: their inputs, silu of an embedding, live in few directions.

With W the weights of all layers that read the same input z, stacked, μ and C the mean and the covariance of z over the
calibration calls, the layers keep the r directions that carry most of their outputs' variance:

    W z + b ≈ W R Q_r [Q_rᵀ R⁻¹ (z − μ)] + W μ + b,   R = C^½,   Q the eigenvectors of R (Wᵀ W) R

Without a bias, μ is 0. Each layer's rows count in inverse proportion to the variance of their outputs. The bracket is
computed once and shared.
"""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from pruning import UserError
from pruning.methods import LayerPruned, Pruned, moments, ranks
from pruning.methods.calibration import Calibration, answer

DAMPING = 1e-4  # of the mean of C's diagonal: directions that calibration has hardly seen


class Basis(NamedTuple):
    """Layers that read the same input, and what they read of it, direction by direction."""

    names: List[str]
    read: Tensor  # Qᵀ R⁻¹, (d, d), the most important direction first
    write: Tensor  # R Q, (d, d)
    mean: Tensor  # μ, (d,)
    lost: Tensor  # share of the outputs' variance that is lost if k directions stay, (d + 1,), k = 0, 1, ...


def prune(denoiser: nn.Module, rate: float, *, mask_only: bool,
          calibration: Optional[Calibration] = None) -> Pruned:
    """Remove, or with mask_only project away, round(rate * n) of all n ranks of the AdaLN layers, in place.

    At least one rank of each input stays. Raises UserError if the denoiser has no AdaLN layers.
    """
    layers = adaln_layers(denoiser)
    if rate == 0:
        return Pruned("ranks", next(iter(layers.values())).in_features, 0, 0, {},
                      {f"{name}.weight": LayerPruned(0.0) for name in layers}, reached(layers))
    known = {basis.names[0]: basis for basis in bases(denoiser, calibration)}
    total = sum(len(basis.mean) for basis in known.values())
    asked = round(rate * total)
    stay, found = kept_ranks(known, total - asked), {}
    for name, basis in known.items():
        width = len(basis.mean)
        if stay[name] < width:
            take(denoiser, basis, stay[name], mask_only)
        found.update({f"{each}.weight": LayerPruned(1 - stay[name] / width, float(basis.lost[stay[name]]))
                      for each in basis.names})
    return Pruned("ranks", total, asked, total - sum(stay.values()), {}, found, reached(layers))


def reached(layers: Dict[str, nn.Linear]) -> Dict[str, int]:
    """Return how many numbers of each parameter of dense AdaLN layers a low rank can save, by name."""
    return {f"{name}.weight": layer.in_features * layer.out_features for name, layer in layers.items()}


def adaln_layers(denoiser: nn.Module) -> Dict[str, nn.Linear]:
    """Return the denoiser's AdaLN layers, by name. Raises UserError if it has none."""
    layers = ranks.modulation_layers(denoiser)
    if not layers:
        raise UserError(f"{type(denoiser).__name__} has no AdaLN layers that modulation could give a low rank; UNets "
                        "take the time embedding through their ResNets, which structured narrows")
    return layers


def largest_rate(denoiser: nn.Module, call: dict, **_) -> float:
    """Return the largest rate at which every layer keeps a rank. Raises UserError if there are no AdaLN layers."""
    return 1 - 1 / max(layer.in_features for layer in adaln_layers(denoiser).values())


def bases(denoiser: nn.Module, calibration: Calibration) -> List[Basis]:
    """Return the bases of the denoiser's AdaLN layers, computed once for all rates."""
    layers = ranks.modulation_layers(denoiser)
    sets = same_inputs(denoiser, layers, calibration)
    gathered = moments.gather(denoiser, calibration, layers={f"{names[0]}.weight": layers[names[0]] for names in sets})
    found = []
    for names in sets:
        matrix, mean = gathered.of(f"{names[0]}.weight", layers[names[0]].weight.device)
        if any(layers[name].bias is None for name in names):  # nothing can hold what the mean input makes
            mean = torch.zeros_like(mean)
        found.append(basis_of(names, [layers[name].weight.detach() for name in names], matrix, mean))
    return found


def same_inputs(denoiser: nn.Module, layers: Dict[str, nn.Linear], calibration: Calibration) -> List[List[str]]:
    """Return the names of the layers in sets whose inputs are equal, each time that they run, in a recorded call."""
    seen: Dict[str, List[Tensor]] = {}
    sets: List[List[str]] = []
    with torch.no_grad(), moments.watched(layers, lambda name, _, x: seen.setdefault(name, []).append(x.clone())):
        answer(denoiser, calibration.calls[0][0])
    for name, inputs in seen.items():
        same = (names for names in sets if len(seen[names[0]]) == len(inputs)
                and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(seen[names[0]], inputs)))
        names = next(same, None)
        if names is None:
            sets.append([name])
        else:
            names.append(name)
    return sets


@torch.no_grad()
def basis_of(names: List[str], weights: List[Tensor], matrix: Tensor, mean: Tensor) -> Basis:
    """Return the basis of layers from their weights (rows, d) and the moments of their input, about `mean`."""
    matrix, mean = matrix[0].double(), mean[0].double()
    covariance = matrix - torch.outer(mean, mean)
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean().clamp_min(1e-30))
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp_min(1e-30).sqrt()
    outputs = torch.zeros_like(covariance)
    for weight in weights:
        gram = weight.double().T @ weight.double()
        outputs += gram / (gram * covariance).sum().clamp_min(1e-30)
    half = vectors * root  # R = half vectorsᵀ
    power, directions = torch.linalg.eigh(half.T @ outputs @ half)
    power, directions = power.flip(0).clamp_min(0), directions.flip(1)
    lost = 1 - torch.cat([power.new_zeros(1), power.cumsum(0)]) / power.sum().clamp_min(1e-30)
    return Basis(names, (directions.T / root) @ vectors.T, half @ directions, mean, lost.clamp_min(0).cpu())


def kept_ranks(known: Dict[str, Basis], stay: int) -> Dict[str, int]:
    """Return how many ranks of each basis stay, `stay` in all if each can keep one: those of most variance."""
    gains = sorted((float(basis.lost[rank + 1] - basis.lost[rank]), name) for name, basis in known.items()
                   for rank in range(1, len(basis.mean)))
    first = dict.fromkeys(known, 1)
    for _, name in gains[:max(stay - len(known), 0)]:
        first[name] += 1
    return first


@torch.no_grad()
def take(denoiser: nn.Module, basis: Basis, rank: int, mask_only: bool) -> None:
    """Give the layers of a basis this rank, in place."""
    read, layers = basis.read[:rank], {name: denoiser.get_submodule(name) for name in basis.names}
    shift = -read @ basis.mean
    dense = {name: (layer.weight.double(), None if layer.bias is None else layer.bias.double())
             for name, layer in layers.items()}
    made = dict(layers) if mask_only else dict(zip(basis.names, ranks.replace(denoiser, basis.names, rank)))
    for name, layer in made.items():
        weight, bias = dense[name]
        up, bias = weight @ basis.write[:, :rank], (0 if bias is None else bias) + weight @ basis.mean
        if mask_only:
            layer.weight.copy_(up @ read)
            bias = bias + up @ shift
        else:
            layer.reads.weight.copy_(read)
            layer.reads.bias.copy_(shift)
            layer.up.weight.copy_(up)
        own = layer if mask_only else layer.up
        if own.bias is not None:
            own.bias.copy_(bias)
