"""The engine that zeroes weights: the score decides which, the rate and the scope decide how many."""
from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pruning import UserError
from pruning.methods import zeroing
from pruning.methods.magnitude import score as magnitude
from pruning.methods.options import SCOPES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNKS = pytest.mark.parametrize("chunk", [7, 64, 1 << 19])
EACH_SCOPE = pytest.mark.parametrize("scope", SCOPES)


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def layers(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return {str(k): torch.randn(shape).to(dtype) for k, shape in enumerate(shapes)}


def count_zeros(weights):
    return int((flat(weights) == 0).sum())


def compared(weights, scope):
    """The sets of weights that a scope compares with each other: all, those of a layer, or those of a row."""
    if scope == "global":
        return [flat(weights)]
    if scope == "layer":
        return [weight.flatten() for weight in weights.values()]
    return [row.flatten() for weight in weights.values() for row in weight]


class Waits(TorchDispatchMode):
    """Counts the operations for whose result a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "index", "masked_select")
        return func(*args, **(kwargs or {}))


# ---- the score

@EACH_SCOPE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_score_decides_what_is_zeroed(scope, dtype):
    weights = layers((30, 20), (16, 8, 3, 3), dtype=dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    zeroing.zero_lowest(weights, 0.3, lambda rows, name: -rows.abs(), scope)  # the opposite of magnitude
    for after, values in zip(compared(weights, scope), compared(before, scope)):
        gone = after == 0
        assert int(gone.sum()) == pytest.approx(0.3 * len(gone), abs=1)
        assert values[gone].abs().min() >= values[~gone].abs().max()


@CHUNKS
def test_scores_of_both_signs_and_of_all_sizes_are_ordered(monkeypatch, chunk):
    monkeypatch.setattr(zeroing, "CHUNK", chunk)
    inf, tiny, above = float("inf"), 1e-45, 2.0000002
    scores = torch.tensor([[2.0, -2.0, 0.0, 1e-40, -1e-40], [-3e38, 3e38, -above, above, 1.9999999],
                           [-1.9999999, tiny, -tiny, inf, -1e20], [-2.0, 2.0, -0.0, 0.0, 2e-5]])
    order = scores.flatten().argsort(stable=True)  # -0.0 and 0.0 are equal to torch too
    places = torch.arange(1.0, 21.0).view(4, 5)
    for count in range(21):
        weight = places.clone()
        zeroing.zero_count({"w": weight}, count, lambda rows, name: scores.flatten()[rows.long() - 1])
        expected = places.clone()
        expected.view(-1)[order[:count]] = 0
        assert torch.equal(weight, expected)


def test_a_threshold_of_many_chunks_waits_for_a_gpu_as_often_as_one_of_one_chunk(monkeypatch):
    weights, waits = layers((64, 16)), {}
    for chunk in (16, 1 << 19):
        monkeypatch.setattr(zeroing, "CHUNK", chunk)
        with Waits() as counting:
            zeroing.check_scores(weights, magnitude)
            zeroing.find_threshold(weights, 300, magnitude)
        waits[chunk] = counting.count
    assert 0 < waits[16] == waits[1 << 19]


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e30])
def test_the_count_is_exact_among_negative_scores_that_differ_in_the_last_bit(size):
    scores = -(torch.full((40,), size).view(torch.int32) + torch.arange(40, dtype=torch.int32)).view(torch.float32)
    scores = scores[torch.randperm(40, generator=torch.Generator().manual_seed(0))].view(8, 5)
    for count in (1, 13, 39):
        weight = torch.ones(8, 5)
        zeroing.zero_count({"w": weight}, count, lambda rows, name: scores)
        assert int((weight == 0).sum()) == count
        assert scores[weight == 0].max() < scores[weight != 0].min()


def test_magnitudes_of_both_signs_and_of_all_sizes_are_ordered():
    weight = torch.tensor([[1e-40, -1e-45, 0.0, -0.0, -3e38, 2e-5, float("-inf"), -2.0000002, 2.0, 1.9999999]])
    order = weight[0].abs().argsort(stable=True)
    for count in range(weight.numel() + 1):
        pruned = weight.clone()
        zeroing.zero_count({"w": pruned}, count, magnitude)
        kept = torch.ones(10, dtype=torch.bool)
        kept[order[:count]] = False
        assert torch.equal(pruned[0], torch.where(kept, weight[0], 0.0))


@EACH_SCOPE
def test_weights_that_are_zero_already_count_first_whatever_their_score(scope):
    weights = layers((20, 10), (40, 10))
    for weight in weights.values():
        weight[::4] = 0  # 150 weights
        weight[1, 3:6] = 0  # 6

    def score(rows, name):
        return torch.where(rows == 0, torch.tensor(1e9), rows)

    zeros = {name: weight == 0 for name, weight in weights.items()}
    for rate in (0.1, 0.3, 0.6):
        zeroing.zero_lowest(weights, rate, score, scope)
        assert count_zeros(weights) == max(156, round(rate * 600))
        assert all((weights[name] == 0)[gone].all() for name, gone in zeros.items())


@CHUNKS
@EACH_SCOPE
def test_what_a_score_knows_of_each_input_broadcasts_over_the_rows_of_its_own_weight(monkeypatch, chunk, scope):
    weights = layers((12, 9), (8, 5, 3, 3))
    input_rms = {"0": torch.rand(9) + 0.1, "1": torch.rand(5, 1, 1) + 0.1}
    scores = {name: weight.abs() * input_rms[name] for name, weight in weights.items()}
    monkeypatch.setattr(zeroing, "CHUNK", chunk)
    zeroing.zero_lowest(weights, 0.4, lambda rows, name: rows.abs() * input_rms[name], scope)
    for after, values in zip(compared(weights, scope), compared(scores, scope)):
        gone = after == 0
        assert values[gone].max() < values[~gone].min()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_gets_whole_rows_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(zeroing, "CHUNK", 20)
    seen = []

    def score(rows, name):
        seen.append((name, rows.dtype, tuple(rows.shape)))
        return rows.abs()

    zeroing.zero_count(layers((5, 9), (3, 4, 3, 3), dtype=dtype), 10, score)
    once = [("0", (2, 9)), ("0", (2, 9)), ("0", (1, 9)), *[("1", (1, 4, 3, 3))] * 3]
    assert seen == [(name, torch.float32, shape) for name, shape in once] * 3


def test_a_score_of_another_shape_is_an_error_and_zeroes_nothing():
    weights = layers((6, 4))
    before = weights["0"].clone()
    with pytest.raises(ValueError, match=r"\(4,\) for rows of \(6, 4\)"):
        zeroing.zero_lowest(weights, 0.5, lambda rows, name: rows.abs().sum(0))
    assert torch.equal(weights["0"], before)


@EACH_SCOPE
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scores_of_nan_or_minus_infinity_are_refused_by_name_before_anything_is_zeroed(scope, value):
    weights = layers((6, 4), (6, 4))
    before = flat(weights)

    def score(rows, name):
        scores = rows.abs()
        if name == "1":
            scores[4, 2] = value
        return scores

    with pytest.raises(UserError, match="^1 has scores that are NaN or -inf"):
        zeroing.zero_lowest(weights, 0.5, score, scope)
    assert torch.equal(flat(weights), before)


def test_the_check_of_scores_keeps_nothing_of_a_block(monkeypatch):
    """A small tensor a block, between the large ones, kept a fifth of a model's memory from being used again."""
    monkeypatch.setattr(zeroing, "CHUNK", 64)
    alive = []

    def score(rows, name):
        alive.append(sum(type(each) is torch.Tensor and each.dim() == 0 for each in gc.get_objects()))
        return rows.abs()

    zeroing.check_scores({"weight": torch.randn(32, 64)}, score)
    assert len(alive) == 32
    assert alive[-1] <= alive[1]


def test_scores_that_repeat_in_memory_or_are_the_rows_are_taken_as_they_are():
    weights = {"0": torch.tensor([[3.0, -1.0, 2.0], [-4.0, 5.0, -6.0]])}
    zeroing.zero_lowest(weights, 0.5, lambda rows, name: rows)
    assert weights["0"].tolist() == [[3, 0, 2], [0, 5, 0]]
    weights = {"0": torch.ones(2, 3)}
    zeroing.zero_lowest(weights, 1 / 3, lambda rows, name: torch.tensor([2.0, -0.0, 1.0]).expand_as(rows))
    assert weights["0"].tolist() == [[1, 0, 1], [1, 0, 1]]


def test_an_unknown_scope_is_refused_before_anything_is_zeroed():
    weights = layers((6, 4))
    with pytest.raises(UserError, match="did you mean 'layer'"):
        zeroing.zero_lowest(weights, 0.5, magnitude, "layers")
    assert count_zeros(weights) == 0


# ---- counts

@CHUNKS
def test_of_equal_weights_the_first_in_order_go(monkeypatch, chunk):
    monkeypatch.setattr(zeroing, "CHUNK", chunk)
    weights = [torch.full((9, 5), 0.25), torch.full((8, 3, 2, 2), -0.25), torch.full((4, 4), 0.125)]
    for count in (3, 16, 17, 47, 61, 100, 157):
        pruned = [weight.clone() for weight in weights]
        zeroing.zero_count(dict(zip("abc", pruned)), count, magnitude)
        tied = torch.cat([weight.flatten() for weight in pruned[:2]]) == 0
        assert int((pruned[2] == 0).sum()) == min(count, 16)
        assert int(tied.sum()) == tied[:max(0, count - 16)].sum() == max(0, count - 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_SCOPE
def test_many_ties_do_not_change_the_count(dtype, scope):
    weights = {name: (weight * 4).round() / 4 for name, weight in layers((50, 70), (16, 8, 3, 3), (3, 3)).items()}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    zeros = count_zeros(weights)  # about a tenth of the weights, which go first
    for rate in (0.05, 0.2, 0.5, 0.77):
        zeroing.zero_lowest(weights, rate, magnitude, scope)
        assert count_zeros(weights) == max(zeros, round(rate * flat(weights).numel()))


def test_one_threshold_spans_layers_of_different_dtypes():
    weights = layers((30, 20), (30, 20), (30, 20))
    weights.update({"1": weights["1"].half(), "2": weights["2"].bfloat16()})
    before = torch.cat([weight.float().flatten() for weight in weights.values()])
    zeroing.zero_lowest(weights, 0.6, magnitude, "global")
    after = torch.cat([weight.float().flatten() for weight in weights.values()])
    assert int((after == 0).sum()) == 1080
    assert before[after == 0].abs().max() <= after[after != 0].abs().min()


@pytest.mark.parametrize("rate", [0.1, 0.333, 0.5, 0.9, 0.999])
def test_layer_counts_are_within_one_of_the_share_and_exact_in_sum(rate):
    weights = list(layers((1, 1), (1, 1), (3, 1), (16, 8), (2, 2), (5, 7), (100, 3), (1, 3)).values())
    counts = zeroing.layer_counts(weights, rate)
    assert sum(counts) == round(rate * sum(weight.numel() for weight in weights))
    for weight, count in zip(weights, counts):
        assert 0 <= count <= weight.numel()
        assert abs(count - rate * weight.numel()) <= 1


def test_layers_that_are_sparse_already_keep_the_sum_exact():
    weights = layers((20, 10), (40, 10), (10, 10))
    weights["0"].zero_()
    zeroing.zero_lowest(weights, 0.5, magnitude, "layer")
    zeros = [int((weight == 0).sum()) for weight in weights.values()]
    assert zeros[0] == 200
    assert sum(zeros) == 350


def test_halves_round_the_same_way_with_zeros_there_already():
    weights = layers((3, 1), (4, 1))
    weights["0"][0] = 0  # round(3.5) is 4, but round(3.5 - 1) is 2
    zeroing.zero_lowest(weights, 0.5, magnitude, "layer")
    assert count_zeros(weights) == 4


def test_small_rises_of_the_rate_stay_exact_in_sum():
    weights = layers((3, 2), (5, 1), (7, 3), (4, 4), (1, 2))
    for rate in [k / 97 for k in range(97)]:
        zeroing.zero_lowest(weights, rate, magnitude, "layer")
        assert count_zeros(weights) == round(rate * 50)


# ---- rows

@pytest.mark.parametrize("rate", [0.03, 0.5, 0.77, 0.999])
def test_the_row_scope_takes_equally_many_of_each_row_and_exactly_the_rate_of_all(rate):
    weights = layers((30, 17), (16, 8, 3, 3), (5, 1), (1, 40))
    zeroing.zero_lowest(weights, rate, magnitude, "row")
    assert count_zeros(weights) == round(rate * flat(weights).numel())
    for weight in weights.values():
        counts = (weight == 0).flatten(1).sum(1)
        assert abs(int(counts.sum()) - rate * weight.numel()) <= 1
        assert counts.max() - counts.min() <= 1


def test_rows_that_are_sparse_already_keep_their_zeros_and_the_others_lose_equally_fewer():
    weights = layers((8, 20), (8, 20))
    weights["0"][2, :15] = 0
    weights["0"][5, :4] = 0
    zeroing.zero_lowest(weights, 0.5, magnitude, "row")
    counts = (weights["0"] == 0).sum(1)
    assert (int(counts.sum()), counts[2]) == (80, 15)
    others = counts[[0, 1, 3, 4, 5, 6, 7]]
    assert others.max() - others.min() <= 1
    assert set((weights["1"] == 0).sum(1).tolist()) == {10}


def test_a_score_of_minus_infinity_marks_a_weight_that_is_gone_and_counts_before_its_row_is_shared_out():
    scores = torch.rand(2, 4, 20)
    scores[0, 2, 5:] = scores[1, 1, :4] = -float("inf")
    mask = zeroing.lowest(scores, 80, "row")
    counts = mask.sum(-1).flatten()
    assert mask[scores == -float("inf")].all()
    assert (int(counts.sum()), counts[2]) == (80, 15)
    assert counts[[0, 1, 3, 4, 5, 6, 7]].max() - counts[[0, 1, 3, 4, 5, 6, 7]].min() <= 1


def test_a_rising_rate_only_adds_zeros_to_each_row_and_stays_exact_in_sum():
    weights = layers((6, 5), (4, 3, 1, 1), (2, 4))
    for rate in [k / 97 for k in range(97)]:
        before = {name: weight == 0 for name, weight in weights.items()}
        zeroing.zero_lowest(weights, rate, magnitude, "row")
        assert count_zeros(weights) == round(rate * 50)
        assert all((weights[name] == 0)[gone].all() for name, gone in before.items())


def test_a_mask_of_the_lowest_has_as_many_as_asked_and_the_first_of_equal_scores():
    scores = torch.tensor([[[2.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]], [[5.0, 4.0, -1.0, 6.0], [7.0, 7.0, 7.0, 7.0]]])
    for count, scope, expected in (
            (4, "row", [[[0, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 0], [1, 0, 0, 0]]]),
            (8, "row", [[[0, 1, 1, 0], [1, 1, 0, 0]], [[0, 1, 1, 0], [1, 1, 0, 0]]]),
            (6, "layer", [[[0, 1, 0, 0], [1, 1, 1, 1]], [[0, 0, 1, 0], [0, 0, 0, 0]]])):
        assert zeroing.lowest(scores, count, scope).int().tolist() == expected
    for scope in SCOPES:
        assert [int(zeroing.lowest(scores, count, scope).sum()) for count in range(17)] == list(range(17))


@CHUNKS
@EACH_SCOPE
def test_masks_and_counts_choose_the_weights_that_zeroing_in_place_takes(monkeypatch, chunk, scope):
    monkeypatch.setattr(zeroing, "CHUNK", chunk)
    weights = {name: (weight * 8).round().add(0.5) for name, weight in layers((30, 20), (16, 6, 3, 3)).items()}  # ties
    counts = zeroing.global_counts(weights, 0.4, magnitude) if scope == "global" else dict(
        zip(weights, zeroing.layer_counts(list(weights.values()), 0.4)))
    masks = {name: zeroing.lowest(weight.abs().flatten(1)[None], counts[name], scope).view_as(weight)
             for name, weight in weights.items()}
    zeroing.zero_lowest(weights, 0.4, magnitude, scope)
    assert all(torch.equal(weight == 0, masks[name]) for name, weight in weights.items())
