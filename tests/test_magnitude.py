from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pruning import UserError
from pruning.methods import magnitude

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RATES = (0.1, 0.333, 0.5, 0.9, 0.999)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dense(request):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).to(request.param).eval()


@pytest.fixture
def denoiser(dense):
    """The dense denoiser, whose weights come back after the test."""
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    yield dense
    dense.load_state_dict(state)


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def layers(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return {str(k): torch.randn(shape).to(dtype) for k, shape in enumerate(shapes)}


@pytest.mark.parametrize("scope", magnitude.SCOPES)
def test_every_rate_is_reached_to_the_weight_and_counted_in_the_denoiser(denoiser, scope):
    total = flat(magnitude.prunable_weights(denoiser)).numel()
    for rate in RATES:  # rising, so that each also starts from the zeros of the one before
        pruned = magnitude.prune(denoiser, rate, scope=scope)
        zeros = int((flat(magnitude.prunable_weights(denoiser)) == 0).sum())
        assert pruned == ("weights", total, round(rate * total), round(rate * total), {})
        assert zeros == pruned.taken


def test_only_linear_and_conv_weights_change(denoiser):
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    magnitude.prune(denoiser, 0.9)
    changed = {name for name, tensor in denoiser.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {f"{name}.weight" for name, module in denoiser.named_modules()
                       if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert not denoiser.training
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


@pytest.mark.parametrize("rate", RATES)
def test_global_zeros_are_the_lowest_of_the_denoiser_and_the_others_stay(denoiser, rate):
    before = flat(magnitude.prunable_weights(denoiser))
    asked = magnitude.prune(denoiser, rate, scope="global").asked
    after = flat(magnitude.prunable_weights(denoiser))
    gone = after == 0
    lowest = before.float().abs().topk(asked, largest=False).values
    assert torch.equal(before[gone].float().abs().sort().values, lowest.sort().values)
    assert torch.equal(after[~gone], before[~gone])


def test_layers_lose_their_own_lowest(denoiser):
    before = {name: weight.detach().clone() for name, weight in magnitude.prunable_weights(denoiser).items()}
    magnitude.prune(denoiser, 0.4, scope="layer")
    for name, weight in magnitude.prunable_weights(denoiser).items():
        gone = weight == 0
        assert abs(int(gone.sum()) - 0.4 * weight.numel()) <= 1
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_magnitudes_of_both_signs_and_of_all_sizes_are_ordered():
    weight = torch.tensor([[1e-40, -1e-45, 0.0, -0.0, -3e38, 2e-5, float("-inf"), -2.0000002, 2.0, 1.9999999]])
    order = weight[0].abs().argsort(stable=True)
    for count in range(weight.numel() + 1):
        pruned = weight.clone()
        magnitude.zero_smallest([pruned], count)
        kept = torch.ones(10, dtype=torch.bool)
        kept[order[:count]] = False
        assert torch.equal(pruned[0], torch.where(kept, weight[0], 0.0))


@pytest.mark.parametrize("chunk", [7, 64, 1 << 19])
def test_of_equal_weights_the_first_in_order_go(monkeypatch, chunk):
    monkeypatch.setattr(magnitude, "CHUNK", chunk)
    weights = [torch.full((9, 5), 0.25), torch.full((8, 3, 2, 2), -0.25), torch.full((4, 4), 0.125)]
    for count in (3, 16, 17, 47, 61, 100, 157):
        pruned = [weight.clone() for weight in weights]
        magnitude.zero_smallest(pruned, count)
        tied = torch.cat([weight.flatten() for weight in pruned[:2]]) == 0
        assert int((pruned[2] == 0).sum()) == min(count, 16)
        assert int(tied.sum()) == tied[:max(0, count - 16)].sum() == max(0, count - 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", magnitude.SCOPES)
def test_masses_of_ties_do_not_change_the_count(dtype, scope):
    weights = {name: (weight * 4).round() / 4 for name, weight in layers((50, 70), (16, 8, 3, 3), (3, 3)).items()}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    zeros = int((flat(weights) == 0).sum())  # about a tenth is zero already, and is picked first
    for rate in (0.05, 0.2, 0.5, 0.77):
        magnitude.zero_share(weights, rate, scope)
        assert int((flat(weights) == 0).sum()) == max(zeros, round(rate * flat(weights).numel()))


def test_one_threshold_spans_layers_of_different_dtypes():
    weights = layers((30, 20), (30, 20), (30, 20))
    weights.update({"1": weights["1"].half(), "2": weights["2"].bfloat16()})
    before = torch.cat([weight.float().flatten() for weight in weights.values()])
    magnitude.zero_share(weights, 0.6, "global")
    after = torch.cat([weight.float().flatten() for weight in weights.values()])
    assert int((after == 0).sum()) == 1080
    assert before[after == 0].abs().max() <= after[after != 0].abs().min()


@pytest.mark.parametrize("scope", magnitude.SCOPES)
def test_channels_last_weights_lose_the_same_and_keep_their_format(denoiser, scope):
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    magnitude.prune(denoiser, 0.5, scope=scope)
    expected = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(state)
    denoiser.to(memory_format=torch.channels_last)
    magnitude.prune(denoiser, 0.5, scope=scope)
    assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in denoiser.state_dict().items())
    denoiser.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("rate", RATES)
def test_layer_counts_are_within_one_of_the_share_and_exact_in_sum(rate):
    weights = list(layers((1, 1), (1, 1), (3, 1), (16, 8), (2, 2), (5, 7), (100, 3), (1, 3)).values())
    counts = magnitude.layer_counts(weights, rate)
    assert sum(counts) == round(rate * sum(weight.numel() for weight in weights))
    for weight, count in zip(weights, counts):
        assert 0 <= count <= weight.numel()
        assert abs(count - rate * weight.numel()) <= 1


def test_layers_that_are_sparse_already_keep_the_sum_exact():
    weights = layers((20, 10), (40, 10), (10, 10))
    weights["0"].zero_()
    magnitude.zero_share(weights, 0.5, "layer")
    zeros = [int((weight == 0).sum()) for weight in weights.values()]
    assert zeros[0] == 200
    assert sum(zeros) == 350


def test_halves_round_the_same_way_with_zeros_there_already():
    weights = layers((3, 1), (4, 1))
    weights["0"][0] = 0  # round(3.5) is 4, but round(3.5 - 1) is 2
    magnitude.zero_share(weights, 0.5, "layer")
    assert int((flat(weights) == 0).sum()) == 4


def test_small_rises_of_the_rate_stay_exact_in_sum():
    weights = layers((3, 2), (5, 1), (7, 3), (4, 4), (1, 2))
    for rate in [k / 97 for k in range(97)]:
        magnitude.zero_share(weights, rate, "layer")
        assert int((flat(weights) == 0).sum()) == round(rate * 50)


def test_a_shared_weight_counts_once():
    first, second = nn.Linear(4, 5), nn.Linear(4, 5)
    second.weight = first.weight
    denoiser = nn.Sequential(first, second)
    assert list(magnitude.prunable_weights(denoiser)) == ["0.weight"]
    assert magnitude.prune(denoiser, 0.5) == ("weights", 20, 10, 10, {})


def test_rate_zero_changes_nothing(denoiser):
    before = flat(magnitude.prunable_weights(denoiser))
    zeros = int((before == 0).sum())  # a half-precision initialisation may hold one
    assert magnitude.prune(denoiser, 0.0) == ("weights", before.numel(), 0, zeros, {})
    assert torch.equal(flat(magnitude.prunable_weights(denoiser)), before)


@pytest.mark.parametrize(("spoil", "arguments", "message"), [
    (lambda linear: None, (1.0,), "rate"),
    (lambda linear: None, (-0.1,), "rate"),
    (lambda linear: None, (float("nan"),), "rate"),
    (lambda linear: None, (0.5, "globl"), "did you mean 'global'"),
    (lambda linear: linear.weight.data[1, 2].fill_(float("nan")), (0.5,), "0.weight holds NaN"),
    (lambda linear: linear.double(), (0.5,), "float64"),
])
def test_bad_input_is_refused_by_name_and_nothing_is_pruned(spoil, arguments, message):
    linear = nn.Linear(4, 4)
    spoil(linear)
    before = linear.weight.detach().clone()
    with pytest.raises(UserError, match=message):
        magnitude.prune(nn.Sequential(linear), *arguments)
    assert torch.equal(linear.weight.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_denoiser_with_nothing_to_prune_is_refused_by_its_class():
    with pytest.raises(UserError, match="^GroupNorm has no Linear or Conv2d"):
        magnitude.prune(nn.GroupNorm(2, 4), 0.5)
