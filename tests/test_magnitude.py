"""Magnitude pruning of a small UNet in each dtype: which weights become zero, and how many."""
from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pruning import UserError
from pruning.methods import LayerPruned, prune
from pruning.methods.options import SCOPES
from pruning.methods.zeroing import prunable_weights

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


def shares(denoiser):
    """The share of zeros that each layer has, as a method reports it that measures no error."""
    return {name: LayerPruned(int((weight == 0).sum()) / weight.numel(), None)
            for name, weight in prunable_weights(denoiser).items()}


@pytest.mark.parametrize("scope", SCOPES)
def test_every_rate_is_reached_to_the_weight_and_counted_in_the_denoiser(denoiser, scope):
    total = flat(prunable_weights(denoiser)).numel()
    for rate in RATES:  # ascending, so that each rate also starts from the zeros of the rate before
        pruned = prune("magnitude", denoiser, rate, scope=scope)
        zeros = int((flat(prunable_weights(denoiser)) == 0).sum())
        assert pruned[:6] == ("weights", total, round(rate * total), round(rate * total), {}, shares(denoiser))
        assert zeros == pruned.taken


def test_only_linear_and_conv_weights_change(denoiser):
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    prune("magnitude", denoiser, 0.9)
    changed = {name for name, tensor in denoiser.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {f"{name}.weight" for name, module in denoiser.named_modules()
                       if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert not denoiser.training
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


@pytest.mark.parametrize("rate", RATES)
def test_global_zeros_are_the_lowest_of_the_denoiser_and_the_others_stay(denoiser, rate):
    before = flat(prunable_weights(denoiser))
    asked = prune("magnitude", denoiser, rate, scope="global").asked
    after = flat(prunable_weights(denoiser))
    gone = after == 0
    lowest = before.float().abs().topk(asked, largest=False).values
    assert torch.equal(before[gone].float().abs().sort().values, lowest.sort().values)
    assert torch.equal(after[~gone], before[~gone])


def test_layers_lose_their_own_lowest(denoiser):
    before = {name: weight.detach().clone() for name, weight in prunable_weights(denoiser).items()}
    prune("magnitude", denoiser, 0.4, scope="layer")
    for name, weight in prunable_weights(denoiser).items():
        gone = weight == 0
        assert abs(int(gone.sum()) - 0.4 * weight.numel()) <= 1
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()


def test_rows_lose_their_own_lowest_and_equally_many(denoiser):
    before = {name: weight.detach().clone() for name, weight in prunable_weights(denoiser).items()}
    prune("magnitude", denoiser, 0.4, scope="row")
    for name, weight in prunable_weights(denoiser).items():
        gone, magnitudes = (weight == 0).flatten(1), before[name].abs().flatten(1)
        counts = gone.sum(1)
        assert abs(int(counts.sum()) - 0.4 * weight.numel()) <= 1
        assert counts.max() - counts.min() <= 1
        highest = magnitudes.masked_fill(~gone, 0).amax(1)
        assert (highest <= magnitudes.masked_fill(gone, float("inf")).amin(1)).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_channels_last_weights_lose_the_same_and_keep_their_format(denoiser, scope):
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    prune("magnitude", denoiser, 0.5, scope=scope)
    expected = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    denoiser.load_state_dict(state)
    denoiser.to(memory_format=torch.channels_last)
    prune("magnitude", denoiser, 0.5, scope=scope)
    assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in denoiser.state_dict().items())
    denoiser.to(memory_format=torch.contiguous_format)


def test_rate_zero_changes_nothing(denoiser):
    before = flat(prunable_weights(denoiser))
    zeros = int((before == 0).sum())  # a half-precision initialisation may hold one
    assert prune("magnitude", denoiser, 0.0)[:6] == ("weights", before.numel(), 0, zeros, {}, shares(denoiser))
    assert torch.equal(flat(prunable_weights(denoiser)), before)


def test_a_shared_weight_counts_once():
    first, second = nn.Linear(4, 5), nn.Linear(4, 5)
    second.weight = first.weight
    denoiser = nn.Sequential(first, second)
    assert list(prunable_weights(denoiser)) == ["0.weight"]
    assert prune("magnitude", denoiser, 0.5)[:6] == ("weights", 20, 10, 10, {}, {"0.weight": (0.5, None)})


def test_modules_with_other_matrices_are_skipped_by_name():
    denoiser = nn.ModuleDict({"layer": nn.Linear(4, 4), "table": nn.Embedding(3, 4), "norm": nn.LayerNorm(4)})
    before = denoiser["table"].weight.detach().clone()
    pruned = prune("magnitude", denoiser, 0.5)
    assert pruned[:6] == ("weights", 16, 8, 8, {"table": "Embedding is neither Linear nor Conv2d"},
                      {"layer.weight": (0.5, None)})
    assert torch.equal(denoiser["table"].weight, before)


@pytest.mark.parametrize(("spoil", "rate", "options", "message"), [
    (lambda linear: None, 1.0, {}, "rate"),
    (lambda linear: None, -0.1, {}, "rate"),
    (lambda linear: None, float("nan"), {}, "rate"),
    (lambda linear: None, 0.5, {"scope": "globl"}, "did you mean 'global'"),
    (lambda linear: linear.weight.data[1, 2].fill_(float("nan")), 0.5, {}, "0.weight has scores that are NaN"),
    (lambda linear: linear.double(), 0.5, {}, "float64"),
])
def test_bad_input_is_refused_by_name_and_nothing_is_pruned(spoil, rate, options, message):
    linear = nn.Linear(4, 4)
    spoil(linear)
    before = linear.weight.detach().clone()
    with pytest.raises(UserError, match=message):
        prune("magnitude", nn.Sequential(linear), rate, **options)
    assert torch.equal(linear.weight.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_denoiser_with_nothing_to_prune_is_refused_by_its_class():
    with pytest.raises(UserError, match="^GroupNorm has no Linear or Conv2d"):
        prune("magnitude", nn.GroupNorm(2, 4), 0.5)
