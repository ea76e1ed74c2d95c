"""Zeroing weights in place: which weights are prunable, and which of them have the lowest scores.

A criterion is one function, score(rows, name) -> scores:
  rows    some whole rows of a weight in float32: (rows, inputs) of a Linear, (rows, inputs / groups, height, width)
          of a Conv2d. They may be a view of the weight, so a score must not change them.
  name    the name of the weight in `prunable_weights`, to look up what was gathered for it.
  scores  of the shape of `rows`; the lowest are zeroed. They may be negative, and are compared in float32.
A score is called several times on the same rows and must give the same each time. Since rows are whole, what a score
needs for each input broadcasts over them: |w| times the input's root mean square is
`lambda rows, name: rows.abs() * input_rms[name]`, with a vector (inputs,) for a Linear and (inputs, 1, 1) for a Conv2d.
"""
from __future__ import annotations

import math
from itertools import accumulate
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from pruning import UserError, check_name
from pruning.methods import METHODS, LayerPruned, Pruned
from pruning.methods.options import SCOPES

Score = Callable[[Tensor, str], Tensor]

PRUNABLE = (nn.Linear, nn.Conv2d)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float32 represents all of them exactly
CHUNK, GPU_CHUNK = 1 << 19, 1 << 23  # weights scored together: bounds the temporaries; a GPU waits for each launch


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

    scope: "layer" takes the same share of every weight tensor (see layer_counts), "row" the same share of each of its
    rows too, "global" the lowest of all tensors.
    Of equal scores the first in order go. Weights that are zero already count first and stay zero, so a growing rate
    only adds zeros. Raises UserError, before anything changes, for an unknown scope and for a score of NaN or -inf.
    """
    check_name("scope", scope, SCOPES)
    check_scores(weights, score)
    if scope == "global":
        zero_count(weights, round(rate * sum(weight.numel() for weight in weights.values())), score)
        return
    for (name, weight), count in zip(weights.items(), layer_counts(list(weights.values()), rate)):
        if scope == "layer":
            zero_count({name: weight}, count, score)
        else:
            zero_in_rows(name, weight, count, score)


@torch.no_grad()
def restore_zeros(weights: Dict[str, Tensor], masks: Dict[str, Tensor]) -> None:
    """Make the weights in the masks zero, in place, and no others.

    Another weight that training or rounding made zero becomes the least normal number, so that counts stay exact.
    """
    for name, weight in weights.items():
        weight.masked_fill_(weight == 0, torch.finfo(weight.dtype).tiny).masked_fill_(masks[name], 0)


def check_scores(weights: Dict[str, Tensor], score: Score) -> None:
    """Raise UserError if a score is NaN or -inf."""
    # One tensor a weight, made before: small ones in between would keep the memory of blocks from being used again.
    lowest_of = {name: torch.full((), math.inf, device=weight.device) for name, weight in weights.items()}
    for name, _, scores in _blocks(weights, score):
        torch.minimum(lowest_of[name], scores.min(), out=lowest_of[name])
    for name, low in zip(lowest_of, torch.stack(list(lowest_of.values())).tolist()):
        if not low > -math.inf:  # false for NaN too, which min() passes on
            raise UserError(f"{name} has scores that are NaN or -inf and so have no order; check the model's weights")


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


def global_counts(weights: Dict[str, Tensor], rate: float, score: Score) -> Dict[str, int]:
    """Return how many weights of each tensor are among the round(rate * n) of lowest score over all n weights.

    All weights that are zero already are among them, even if they are more.
    """
    total, zeros = (sum(map(size, weights.values())) for size in (Tensor.numel, count_zeros))
    count = max(round(rate * total), zeros)
    if count <= 0:
        return dict.fromkeys(weights, 0)
    threshold, ties = find_threshold(weights, count, score)
    below, equal = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
    for name, _, scores in _blocks(weights, score, with_zeros(weights)):
        below[name] += (scores < threshold).sum()
        equal[name] += (scores == threshold).sum()
    counts = {}
    for name in weights:  # of equal scores the first in order go
        taken = min(ties, int(equal[name]))
        counts[name] = int(below[name]) + taken
        ties -= taken
    return counts


def lowest(scores: Tensor, count: int, scope: str = "layer") -> Tensor:
    """Return a mask of the `count` lowest scores of a tensor (groups, rows, d); of equal scores the first go.

    scope: "row" takes equally many of each row, otherwise the lowest of all go.
    """
    if scope == "row":
        return lowest_in_rows(scores, count)
    flat = scores.flatten()
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[: count - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view(scores.shape)


def lowest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the lowest scores of each row (groups, rows, d): `count` in all, as evenly as whole numbers go.

    Of equal scores the first in order go. Scores of -inf are of weights that are zero already, see row_counts.
    """
    counts = row_counts((scores == -math.inf).sum(-1).flatten(), count)
    return _lowest_of_each(scores, counts.view(*scores.shape[:2]))


def row_counts(zeros: Tensor, count: int) -> Tensor:
    """Return how many zeros each row of a weight gets, `count` in all, as evenly as whole numbers go: (rows,) int64.

    zeros: how many each row has, (rows,). A row that has more than its share keeps them, and the others get fewer in
    proportion to their shares.
    """
    shares = (count - zeros.cpu().double() * len(zeros)).clamp_min(0)  # of the missing zeros, times the rows
    missing = max(0, count - int(zeros.sum()))
    bounds = shares.cumsum(0)
    if missing:
        bounds = (bounds / (bounds[-1] / missing)).round()  # the divisor is the number of rows if no row has zeros
    else:
        bounds = torch.zeros_like(bounds)
    return zeros + bounds.diff(prepend=bounds.new_zeros(1)).long().to(zeros.device)


@torch.no_grad()
def zero_in_rows(name: str, weight: Tensor, count: int, score: Score) -> None:
    """Zero `count` weights of a tensor, in place: the lowest of each row, as evenly as whole numbers go.

    Weights that are zero already count first, see row_counts. `count` is at least their number.
    """
    counts = row_counts((weight.detach() == 0).flatten(1).sum(1), count)
    start = 0
    for _, rows, scores in _blocks({name: weight}, score, with_zeros({name: weight})):
        some = counts[start:start + len(rows)]
        rows.masked_fill_(_lowest_of_each(scores.flatten(1), some).view_as(rows), 0)
        start += len(rows)


def _lowest_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """Return a mask of the lowest scores along the last dimension, as many as `counts` says for each row."""
    ranks = torch.empty_like(scores, dtype=torch.int32)
    order = scores.argsort(dim=-1, stable=True)
    ranks.scatter_(-1, order, torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand_as(order))
    return ranks < counts[..., None]


@torch.no_grad()
def zero_count(weights: Dict[str, Tensor], count: int, score: Score) -> None:
    """Zero exactly the `count` weights of lowest score over all tensors, in place.

    Of equal scores the first in order go, and weights that are zero already go before all others.
    """
    if count <= 0:
        return
    threshold, ties = find_threshold(weights, count, score)
    for _, rows, scores in _blocks(weights, score, with_zeros(weights)):
        kept = scores >= threshold
        if ties:
            tied = (scores == threshold).flatten().nonzero()[:ties, 0]
            kept.view(-1)[tied] = False
            ties -= len(tied)
        bits = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
        bits &= kept.to(bits.dtype).neg_()  # -1 has all bits set; masked_fill_ takes several times as long on the CPU


@torch.no_grad()
def find_threshold(weights: Dict[str, Tensor], count: int, score: Score) -> Tuple[float, int]:
    """Return the `count`-th lowest score, and how many of the scores equal to it are among the `count` lowest.

    Weights that are zero have the score -inf. A radix selection on the bits of the scores: a histogram of the upper 16
    bits of all scores finds those of the threshold, and a histogram of the lower 16 bits of the scores that share them
    finds the rest. So the threshold is exact, in constant memory. A GPU is waited for once a histogram.
    """
    zeros = with_zeros(weights)

    def bits():
        return (scores.view(torch.int32) for _, _, scores in _blocks(weights, score, zeros))

    # As int32, the bits of negative floats are negative too, but in the opposite order: -1.0 comes before -2.0.
    negative, positive = torch.arange(-1, -0x8001, -1), torch.arange(0x8000)
    high, rank = _digit(((each >> 16).add_(0x8000) for each in bits()), count, torch.cat([negative, positive]) + 0x8000)
    high -= 0x8000
    order = torch.arange(0x10000) if high >= 0 else torch.arange(0xFFFF, -1, -1)
    low, ties = _digit((torch.where(each >> 16 == high, each & 0xFFFF, 0x10000) for each in bits()), rank, order)
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item(), ties


def with_zeros(weights: Dict[str, Tensor]) -> Set[str]:
    """Return the names of the weight tensors that hold zeros."""
    return {name for name, weight in weights.items() if not weight.detach().all()}


def report(denoiser: nn.Module, weights: Dict[str, Tensor], rate: float, method: str,
           errors: Optional[Dict[str, float]] = None) -> Pruned:
    """Return what was done, counted in the pruned denoiser. Skipped are other parameters of two dimensions or more.

    method: a name in METHODS, which says what the unit is called. errors: relative output error of layers, by name.
    """
    total = sum(weight.numel() for weight in weights.values())
    skipped = {}
    for name, parameter in denoiser.named_parameters():
        module, _, own = name.rpartition(".")
        if name not in weights and parameter.dim() > 1 and parameter.numel():
            skipped[module if own == "weight" else name] = why_not(denoiser.get_submodule(module), own)
    zeros = {name: count_zeros(weight) for name, weight in weights.items()}
    layers = {name: LayerPruned(zeros[name] / weight.numel(), (errors or {}).get(name))
              for name, weight in weights.items()}
    reached = {name: weight.numel() for name, weight in weights.items()}
    return Pruned(METHODS[method].unit, total, round(rate * total), sum(zeros.values()), skipped, layers, reached)


def why_not(module: nn.Module, name: str) -> str:
    """Return why a module's parameter of two dimensions or more is no prunable weight."""
    if name == "weight":
        return f"{type(module).__name__} is neither Linear nor Conv2d"
    return f"{name} of {type(module).__name__} is not the weight of a layer"


def count_zeros(weight: Tensor) -> int:
    """Return the number of weights that are exactly zero."""
    return weight.numel() - int(torch.count_nonzero(weight.detach()))


def _blocks(weights: Dict[str, Tensor], score: Score,
            zeros: Iterable[str] = ()) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """Yield the name of each weight tensor, a view of some of its rows, and their scores.

    The scores are in float32 and row-major order, without -0.0. In the tensors named in `zeros`, the score of a weight
    that is zero is -inf.
    """
    for name, weight in weights.items():
        for rows in weight.detach().split(max(1, (GPU_CHUNK if weight.is_cuda else CHUNK) // weight[0].numel())):
            scores = score(rows.float(), name)
            if scores.shape != rows.shape:  # a smaller shape would broadcast and zero other weights than asked
                raise ValueError(f"a score of {name} is {tuple(scores.shape)} for rows of {tuple(rows.shape)}")
            scores = scores.float().contiguous()
            scores += 0.0  # makes -0.0 the equal 0.0, so that bits order scores; in place, as a copy takes longer
            if name in zeros:
                scores = scores.masked_fill(rows == 0, -math.inf)
            yield name, rows, scores


def _digit(digits: Iterable[Tensor], rank: int, order: Tensor) -> Tuple[int, int]:
    """Return the 16-bit digit of that rank (from 1) among all, and the rank among the digits equal to it.

    digits: int32. The number 0x10000 is no digit and does not count. order: all 65,536 digits, from the one that ranks
    first.
    """
    counts = 0
    for each in digits:
        counts += _histogram(each.flatten())
    counts = counts.cpu()[order]  # without the last, 0x10000
    up_to = counts.cumsum(0)
    place = int(torch.searchsorted(up_to, rank))
    return int(order[place]), rank - int(up_to[place] - counts[place])


def _histogram(numbers: Tensor) -> Tensor:
    """Return how often each of 0 to 0x10000 occurs, int64. On CUDA, bincount would be waited for twice."""
    if numbers.is_cuda:
        ones = torch.ones((), dtype=torch.int64, device=numbers.device).expand(len(numbers))
        return ones.new_zeros(0x10001).index_add_(0, numbers, ones)
    return torch.bincount(numbers, minlength=0x10001)
