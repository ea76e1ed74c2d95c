"""Magnitude pruning: the weights of lowest |w| become zero (Han et al., 2015, arXiv:1506.02626)."""
from __future__ import annotations

from itertools import accumulate
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError, check_name
from pruning.methods import Pruned

SCOPES = {"layer": "every layer loses the same share", "global": "one threshold over the whole denoiser"}
PRUNABLE = (nn.Linear, nn.Conv2d)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds each exactly
CHUNK = 1 << 19  # weights looked at together: bounds the temporaries to a few MiB


def prunable_weights(denoiser: nn.Module) -> Dict[str, nn.Parameter]:
    """The weights of every Linear and Conv2d by name, a shared one once. No biases, norms or embeddings.

    Raises UserError where there are none, or one is of a dtype that cannot be pruned.
    """
    weights, seen = {}, set()
    for name, module in denoiser.named_modules():
        if isinstance(module, PRUNABLE) and id(module.weight) not in seen and module.weight.numel():
            seen.add(id(module.weight))
            weights[f"{name}.weight" if name else "weight"] = module.weight
    if not weights:
        raise UserError(f"{type(denoiser).__name__} has no Linear or Conv2d weights, so there is nothing to prune")
    for name, weight in weights.items():
        if weight.dtype not in DTYPES:
            raise UserError(f"{name} is {weight.dtype}; load the model in float32, float16 or bfloat16 to prune it")
    return weights


def prune(denoiser: nn.Module, rate: float, scope: str = "layer") -> Pruned:
    """Zero the round(rate * n) of all n prunable weights that have the lowest |w|, in place.

    Raises UserError for a rate outside [0, 1), an unknown scope, NaN weights, or nothing to prune.
    """
    check_request(rate, scope)
    weights = prunable_weights(denoiser)
    zero_share(weights, rate, scope)
    return report(denoiser, weights, rate)


def report(denoiser: nn.Module, weights: Dict[str, Tensor], rate: float) -> Pruned:
    """What was done, counted in the pruned denoiser, and the modules whose matrices are not pruned."""
    total = sum(weight.numel() for weight in weights.values())
    left_out = {name: f"{type(module).__name__} is neither Linear nor Conv2d"
                for name, module in denoiser.named_modules() if not isinstance(module, PRUNABLE)
                and isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1}
    return Pruned("weights", total, round(rate * total), sum(map(count_zeros, weights.values())), left_out)


def check_request(rate: float, scope: str) -> None:
    """Raise UserError for an unknown scope or a rate outside [0, 1)."""
    check_name("scope", scope, SCOPES)
    if not 0 <= rate < 1:
        raise UserError(f"a pruning rate is a number from 0 up to, but not, 1; got {rate}")


def zero_share(weights: Dict[str, Tensor], rate: float, scope: str) -> None:
    """Zero the lowest |w| until round(rate * n) are zero, over all weights or each layer its share.

    Weights that are zero already count, so a growing rate grows the set of zeros and never exceeds it.
    """
    for name, weight in weights.items():
        if weight.detach().max().isnan():  # max() passes NaN on, and needs no mask as large as the weight
            raise UserError(f"{name} holds NaN, so its weights have no order to prune by; check the model's files")
    layers = list(weights.values())
    if scope == "global":
        zero_smallest(layers, round(rate * sum(weight.numel() for weight in layers)))
        return
    for weight, count in zip(layers, layer_counts(layers, rate)):
        zero_smallest([weight], count)


def layer_counts(weights: Sequence[Tensor], rate: float) -> List[int]:
    """How many zeros each layer gets: within 1 of rate * n_layer, in sum exactly round(rate * n).

    The running sum is rounded, not the counts. A layer that has more zeros than its share keeps them,
    and the others get so many fewer.
    """
    sizes, zeros = [weight.numel() for weight in weights], [count_zeros(weight) for weight in weights]
    missing = max(0, round(rate * sum(sizes)) - sum(zeros))
    shares = [max(0.0, rate * size - zero) for size, zero in zip(sizes, zeros)]
    scale = (rate * sum(sizes) - sum(zeros)) / sum(shares) if missing else 0.0  # 1 where no layer is over its share
    bounds = [0] + [min(missing, round(scale * bound)) for bound in accumulate(shares)]
    bounds[-1] = missing
    return [zero + after - before for zero, before, after in zip(zeros, bounds, bounds[1:])]


@torch.no_grad()
def zero_smallest(weights: Sequence[Tensor], count: int) -> None:
    """Zero exactly the `count` weights of lowest |w|, in place; of equal ones those that come first."""
    if count <= 0:
        return
    threshold, ties = find_threshold(weights, count)
    for rows, bits in _chunks(weights):
        smallest = bits < threshold
        if ties:
            tied = (bits == threshold).flatten().nonzero()[:ties, 0]
            smallest.view(-1)[tied] = True
            ties -= len(tied)
        rows.masked_fill_(smallest, 0)


def find_threshold(weights: Sequence[Tensor], count: int) -> Tuple[int, int]:
    """The bit pattern of the `count`-th lowest |w| as a float32, and how many of those equal to it are among them.

    A radix selection: the bit pattern of |w| orders as |w| does, so a histogram of its upper 16 bits and one of
    the lower 16 bits beneath find the threshold exactly, in a memory that does not grow.
    """
    high, rank = _digit((bits >> 16 for _, bits in _chunks(weights)), count)
    low, ties = _digit((bits[bits >> 16 == high] & 0xFFFF for _, bits in _chunks(weights)), rank)
    return high << 16 | low, ties


def count_zeros(weight: Tensor) -> int:
    """The number of weights that are exactly zero."""
    return weight.numel() - int(torch.count_nonzero(weight.detach()))


def _chunks(weights: Iterable[Tensor]) -> Iterator[Tuple[Tensor, Tensor]]:
    """Views of some rows of each weight, with the bit patterns of their |w| (int32, in row-major order)."""
    for weight in weights:
        for rows in weight.detach().split(max(1, CHUNK // weight[0].numel())):
            yield rows, (rows.float().view(torch.int32) & 0x7FFFFFFF).contiguous()


def _digit(digits: Iterable[Tensor], rank: int) -> Tuple[int, int]:
    """The 16-bit digit of that rank (from 1) among all, and the rank among those equal to it."""
    counts = sum(torch.bincount(digit.flatten(), minlength=1 << 16).cpu() for digit in digits)
    up_to = counts.cumsum(0)
    digit = int(torch.searchsorted(up_to, rank))
    return digit, rank - int(up_to[digit] - counts[digit])
