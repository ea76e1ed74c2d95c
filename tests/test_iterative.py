from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pruning import UserError
from pruning.methods import iterative, magnitude

STEPS = 2


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D")).eval()


@pytest.fixture(scope="module")
def dense():
    return unet()


@pytest.fixture(scope="module")
def calls(dense):
    """What the dense denoiser answers to noise, at timesteps from first to last."""
    recorded = []
    for timestep in range(50, 1000, 150):
        kwargs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(timestep),
                  "encoder_hidden_states": torch.randn(2, 3, 8), "cross_attention_kwargs": None, "return_dict": False}
        with torch.no_grad():
            recorded.append((kwargs, dense(**kwargs)[0]))
    return recorded


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr(iterative, "CALLS_PER_STEP", 2)


def zeros(denoiser):
    return sum(int((weight == 0).sum()) for weight in magnitude.prunable_weights(denoiser).values())


def equal(denoiser, other):
    state, other = denoiser.state_dict(), other.state_dict()
    return all(state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in other)


def loss(denoiser, calls):
    with torch.no_grad():
        return sum(float(iterative.distillation_loss(denoiser, *call)) for call in calls)


def walked(dense, rate, calls, **options):
    denoiser = copy.deepcopy(dense)
    pruned = iterative.prune(denoiser, rate, recovery_steps=STEPS, calls=calls, **options)
    return denoiser, pruned


@pytest.mark.parametrize("scope", magnitude.SCOPES)
def test_without_recovery_it_is_magnitude_pruning(dense, scope):
    denoiser, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    assert iterative.prune(denoiser, 0.45, scope, recovery_steps=0) == magnitude.prune(expected, 0.45, scope)
    assert equal(denoiser, expected)


@pytest.mark.parametrize("scope", magnitude.SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_rate_is_reached_to_the_weight_in_the_dtype_it_came_in(dense, calls, scope, dtype):
    denoiser, pruned = walked(copy.deepcopy(dense).to(dtype), 0.25, calls, scope=scope)
    assert pruned.taken == pruned.asked == round(0.25 * pruned.total) == zeros(denoiser)
    assert {tensor.dtype for tensor in denoiser.state_dict().values()} == {dtype}


def test_kept_weights_that_train_to_what_half_precision_rounds_to_zero_stay_in_the_count(dense, calls, monkeypatch):
    half = copy.deepcopy(dense).half()
    half.conv_out.weight.data.fill_(6e-8)  # float16's least; a training step takes many of them below half of it
    monkeypatch.setattr(iterative, "LEARNING_RATE", 5e-8)
    monkeypatch.setattr(iterative, "WARMUP_STEPS", 1)
    denoiser, pruned = walked(half, 0.1, calls)
    assert pruned.taken == pruned.asked == zeros(denoiser)


def test_a_sweep_that_resumes_and_a_single_rate_give_the_same_bits(dense, calls, tmp_path):
    path = tmp_path / "deep" / "unet.walk.safetensors"
    for rate in (0.1, 0.2, 0.25, 0.3):
        resumed, pruned = walked(dense, rate, calls, checkpoint=path)
        single, expected = walked(dense, rate, calls)
        assert pruned == expected
        assert equal(resumed, single)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_resumed_walk_trains_only_what_is_left(dense, calls, tmp_path, monkeypatch):
    path = tmp_path / "walk.safetensors"
    trained = []
    recover = iterative._recover
    monkeypatch.setattr(iterative, "_recover", lambda *arguments: trained.append(1) or recover(*arguments))
    for rate, expected in ((0.2, 2), (0.2, 0), (0.3, 1), (3 * 0.1, 0), (0.35, 1), (0.2, 2)):
        trained.clear()
        walked(dense, rate, calls, checkpoint=path)
        assert len(trained) == expected, rate


def test_a_half_precision_sweep_resumes_in_full_precision(dense, calls, tmp_path):
    half = copy.deepcopy(dense).half()
    walked(half, 0.1, calls, checkpoint=tmp_path / "walk")
    resumed, _ = walked(half, 0.2, calls, checkpoint=tmp_path / "walk")
    assert equal(resumed, walked(half, 0.2, calls)[0])


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"no safetensors"),
    lambda path: path.write_bytes(path.read_bytes()[:-8]),
    lambda path: save_file({"x": torch.zeros(3)}, path),
    lambda path: save_file({"x": torch.zeros(3)}, path, metadata={"rate": "0.1", "walk": "another"}),
    lambda path: path.unlink(),
])
def test_a_checkpoint_that_is_none_is_ignored(dense, calls, tmp_path, spoil):
    path = tmp_path / "walk.safetensors"
    walked(dense, 0.1, calls, checkpoint=path)
    spoil(path)
    denoiser, _ = walked(dense, 0.2, calls, checkpoint=path)
    assert equal(denoiser, walked(dense, 0.2, calls)[0])
    assert "conv_in.weight" in load_file(path)  # and replaced


def test_a_checkpoint_of_another_walk_is_ignored(dense, calls, tmp_path):
    path = tmp_path / "walk.safetensors"
    other = copy.deepcopy(dense)
    other.conv_in.weight.data += 0.1
    for options in ({"seed": 1}, {"scope": "global"}, {"calls": calls[:-1]}, {"dense": other}):
        arguments = dict({"dense": dense, "calls": calls}, **options)
        walked(rate=0.1, checkpoint=path, **arguments)
        denoiser, _ = walked(dense, 0.1, calls, checkpoint=path)
        assert equal(denoiser, walked(dense, 0.1, calls)[0]), options


def test_what_is_pruned_stays_pruned_and_what_is_kept_adapts(dense, calls):
    state = {}
    for rate in (0.1, 0.2, 0.3):
        denoiser, _ = walked(dense, rate, calls)
        for name, weight in magnitude.prunable_weights(denoiser).items():
            gone = weight == 0
            assert gone[state.get(name, torch.zeros_like(gone))].all()
            assert not torch.equal(weight[~gone], dict(dense.named_parameters())[name][~gone])
            state[name] = gone
    assert not torch.equal(denoiser.conv_out.bias, dense.conv_out.bias)
    assert not torch.equal(denoiser.conv_norm_out.weight, dense.conv_norm_out.weight)


@pytest.mark.parametrize("scope", magnitude.SCOPES)
def test_recovery_answers_more_like_the_dense_denoiser(dense, calls, scope, monkeypatch):
    monkeypatch.setattr(iterative, "LEARNING_RATE", 2e-3)  # few steps must do here
    monkeypatch.setattr(iterative, "WARMUP_STEPS", 1)
    denoiser, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    iterative.prune(denoiser, 0.5, scope, recovery_steps=4, calls=calls)
    magnitude.prune(masked, 0.5, scope)
    assert loss(dense, calls) < 1e-10
    assert loss(denoiser, calls) < 0.8 * loss(masked, calls)


def test_calls_with_nested_and_half_precision_tensors_are_matched_to_the_denoiser(dense, calls):
    def halved(kwargs):
        return {name: value.half() if torch.is_tensor(value) and value.is_floating_point() else value
                for name, value in kwargs.items()}

    nested = [(dict(halved(kwargs), return_dict=True, added_cond_kwargs={"unused": (torch.zeros(1).half(), "x")}),
               target.half()) for kwargs, target in calls]
    _, pruned = walked(dense, 0.1, nested)
    assert pruned.taken == pruned.asked


def test_modes_flags_and_gradients_are_as_they_were(dense, calls):
    denoiser = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    denoiser.conv_in.weight.requires_grad_(False)
    with torch.no_grad():  # also where the caller's gradients are off
        iterative.prune(denoiser, 0.1, recovery_steps=1, calls=calls)
    assert not any(module.training for module in denoiser.modules())
    assert [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad] == [
        "conv_in.weight"]
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("options", "message"), [
    ({"rate": 0.1}, "recovery needs recorded calls"),
    ({"rate": 0.1, "calls": []}, "recovery needs recorded calls"),
    ({"rate": 0.1, "recovery_steps": -1}, "recovery_steps"),
    ({"rate": 1.5}, "rate"),
    ({"rate": 0.1, "scope": "layers"}, "did you mean 'layer'"),
])
def test_bad_input_is_refused_and_nothing_is_pruned(dense, options, message):
    denoiser = copy.deepcopy(dense)
    with pytest.raises(UserError, match=message):
        iterative.prune(denoiser, **options)
    assert equal(denoiser, dense)


def test_a_recovery_that_is_not_finite_is_refused(dense, calls):
    spoilt = [(kwargs, target * float("inf")) for kwargs, target in calls]
    with pytest.raises(UserError, match="not finite"):
        walked(dense, 0.1, spoilt)
