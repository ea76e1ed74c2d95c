"""Zeroing weights in place: which weights are prunable, and which of them have the lowest scores.

A criterion is one function, score(rows, name) -> scores:
  rows    some whole rows of a weight in float32: (rows, inputs) of a Linear, (rows, inputs / groups, height, width)
          of a Conv2d. They may be a view of the weight, so a score must not change them.
  name    the name of the weight in `prunable_weights`, to look up what was gathered for it.
  scores  of the shape of `rows`; the lowest are zeroed. Any float but NaN, negative ones too, compared as float32.
A score is called several times on the same rows and must give the same each time. Since rows are whole, what a score
needs for each input broadcasts over them: |w| times the input's root mean square is
`lambda rows, name: rows.abs() * input_rms[name]`, with a vector (inputs,) for a Linear and (inputs, 1, 1) for a Conv2d.
"""
from __future__ import annotations

from itertools import accumulate
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError, check_name
from pruning.methods import METHODS, SCOPES, Pruned

Score = Callable[[Tensor, str], Tensor]

PRUNABLE = (nn.Linear, nn.Conv2d)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float32 represents all of them exactly
CHUNK = 1 << 19  # weights scored together: bounds the temporaries to a few MiB
LOWEST = torch.iinfo(torch.int32).min  # the key of weights that are zero already, below the key of every score


def prunable_weights(denoiser: nn.Module) -> Dict[str, nn.Parameter]:
    """Return the weights of every Linear and Conv2d by name, a shared weight once. No biases, norms or embeddings.

    Raises UserError if there are none, or if one is not float32, float16 or bfloat16.
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


@torch.no_grad()
def zero_lowest(weights: Dict[str, Tensor], rate: float, score: Score, scope: str = "layer") -> None:
    """Zero the weights of lowest score, in place, until round(rate * n) of all n weights are zero.

    scope: "layer" takes the same share of every weight tensor (see layer_counts), "global" the lowest of all tensors.
    Of equal scores the first in order go. Weights that are zero already count first and stay zero, so a growing rate
    only adds zeros. Raises UserError for an unknown scope and for a score that is NaN, before anything changes.
    """
    check_name("scope", scope, SCOPES)
    for name, _, scores in _blocks(weights, score):
        if scores.max().isnan():  # max() passes NaN on, and needs no mask
            raise UserError(f"{name} has scores that are NaN and so have no order; check the weights of the model")
    if scope == "global":
        zero_count(weights, round(rate * sum(weight.numel() for weight in weights.values())), score)
        return
    for (name, weight), count in zip(weights.items(), layer_counts(list(weights.values()), rate)):
        zero_count({name: weight}, count, score)


def layer_counts(weights: Sequence[Tensor], rate: float) -> List[int]:
    """Return how many zeros each weight tensor gets: within 1 of rate * its size, in sum exactly round(rate * n).

    The running sum is rounded, not the single counts. A tensor that has more zeros than its share keeps them, and the
    others get fewer in proportion to their shares.
    """
    sizes, zeros = [weight.numel() for weight in weights], [count_zeros(weight) for weight in weights]
    missing = max(0, round(rate * sum(sizes)) - sum(zeros))
    shares = [max(0.0, rate * size - zero) for size, zero in zip(sizes, zeros)]
    scale = (rate * sum(sizes) - sum(zeros)) / sum(shares) if missing else 0.0  # 1 if no tensor is over its share
    bounds = [0] + [min(missing, round(scale * bound)) for bound in accumulate(shares)]
    bounds[-1] = missing
    return [zero + after - before for zero, before, after in zip(zeros, bounds, bounds[1:])]


@torch.no_grad()
def zero_count(weights: Dict[str, Tensor], count: int, score: Score) -> None:
    """Zero exactly the `count` weights of lowest score over all tensors, in place; of equal scores the first go."""
    if count <= 0:
        return
    threshold, ties = find_threshold(weights, count, score)
    for _, rows, scores in _blocks(weights, score):
        keys = _keys(rows, scores)
        lowest = keys < threshold
        if ties:
            tied = (keys == threshold).flatten().nonzero()[:ties, 0]
            lowest.view(-1)[tied] = True
            ties -= len(tied)
        rows.masked_fill_(lowest, 0)


@torch.no_grad()
def find_threshold(weights: Dict[str, Tensor], count: int, score: Score) -> Tuple[int, int]:
    """Return the key (see _keys) of the `count`-th lowest score, and how many equal keys are among the `count` lowest.

    A radix selection: a histogram of the upper 16 bits of all keys finds those of the threshold, and a histogram of
    the lower 16 bits of the keys that share them finds the rest. So the threshold is exact, in constant memory.
    """
    def keys():
        return (_keys(rows, scores) for _, rows, scores in _blocks(weights, score))

    high, rank = _digit(((each >> 16) + 0x8000 for each in keys()), count)  # + 0x8000: from 0
    high -= 0x8000
    low, ties = _digit((each[each >> 16 == high] & 0xFFFF for each in keys()), rank)
    return high << 16 | low, ties


def report(denoiser: nn.Module, weights: Dict[str, Tensor], rate: float, method: str) -> Pruned:
    """Return what was done, counted in the pruned denoiser. Skipped are modules with other weight matrices.

    method: a name in METHODS, which says what the unit is called.
    """
    total = sum(weight.numel() for weight in weights.values())
    skipped = {name: f"{type(module).__name__} is neither Linear nor Conv2d"
               for name, module in denoiser.named_modules() if not isinstance(module, PRUNABLE)
               and isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1}
    return Pruned(METHODS[method].unit, total, round(rate * total), sum(map(count_zeros, weights.values())), skipped)


def count_zeros(weight: Tensor) -> int:
    """Return the number of weights that are exactly zero."""
    return weight.numel() - int(torch.count_nonzero(weight.detach()))


def _blocks(weights: Dict[str, Tensor], score: Score) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """Yield the name of each weight, a view of some of its rows, and their scores in float32, row by row."""
    for name, weight in weights.items():
        for rows in weight.detach().split(max(1, CHUNK // weight[0].numel())):
            scores = score(rows.float(), name)
            if scores.shape != rows.shape:  # a smaller shape would broadcast and zero other weights than asked
                raise ValueError(f"a score of {name} is {tuple(scores.shape)} for rows of {tuple(rows.shape)}")
            yield name, rows, scores.float()


def _keys(rows: Tensor, scores: Tensor) -> Tensor:
    """Return int32 keys in row-major order that sort as the scores do, and LOWEST for weights that are zero.

    The bit pattern of a float is sign and magnitude, and magnitudes sort as floats do; so the pattern becomes a two's
    complement. -0.0 and 0.0 get the same key.
    """
    bits = scores.view(torch.int32)
    return torch.where(bits < 0, LOWEST - bits, bits).masked_fill_(rows == 0, LOWEST).contiguous()


def _digit(digits: Iterable[Tensor], rank: int) -> Tuple[int, int]:
    """Return the 16-bit digit of that rank (from 1) among all, and the rank among the digits equal to it."""
    counts = sum(torch.bincount(digit.flatten(), minlength=1 << 16).cpu() for digit in digits)
    up_to = counts.cumsum(0)
    digit = int(torch.searchsorted(up_to, rank))
    return digit, rank - int(up_to[digit] - counts[digit])
