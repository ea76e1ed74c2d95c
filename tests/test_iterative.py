"""Iterative pruning of a small UNet: the schedule, its checkpoint, and recovery, which other methods can use too."""
from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pruning import UserError
from pruning.methods import iterative, muon, prune, recovery, zeroing
from pruning.methods.calibration import Calibration
from pruning.methods.options import SCOPES

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
    monkeypatch.setattr(recovery, "CALLS_PER_STEP", 2)


def zeros(denoiser):
    return sum(int((weight == 0).sum()) for weight in zeroing.prunable_weights(denoiser).values())


def equal(denoiser, other):
    state, other = denoiser.state_dict(), other.state_dict()
    return all(state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]) for name in other)


def loss(denoiser, calls):
    with torch.no_grad():
        return sum(float(recovery.distillation_loss(denoiser, *call)) for call in calls)


def calibrated(calls, seed=0, checkpoint=None):
    return Calibration(lambda: calls, seed, checkpoint=checkpoint)


def recovered(dense, rate, calls, seed=0, checkpoint=None, **options):
    """A copy of the dense denoiser pruned to `rate` with recovery, and what the method reports."""
    denoiser = copy.deepcopy(dense)
    pruned = prune("iterative", denoiser, rate, recovery_steps=STEPS, calibration=calibrated(calls, seed, checkpoint),
                   **options)
    return denoiser, pruned


@pytest.mark.parametrize("scope", SCOPES)
def test_without_recovery_it_is_magnitude_pruning(dense, scope):
    denoiser, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    assert prune("iterative", denoiser, 0.45, scope=scope, recovery_steps=0) == prune(
        "magnitude", expected, 0.45, scope=scope)
    assert equal(denoiser, expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_rate_is_reached_to_the_weight_in_the_dtype_it_came_in(dense, calls, scope, dtype):
    denoiser, pruned = recovered(copy.deepcopy(dense).to(dtype), 0.25, calls, scope=scope)
    assert pruned.taken == pruned.asked == round(0.25 * pruned.total) == zeros(denoiser)
    assert {tensor.dtype for tensor in denoiser.state_dict().values()} == {dtype}


def test_kept_weights_that_train_to_what_half_precision_rounds_to_zero_stay_in_the_count(dense, calls, monkeypatch):
    half = copy.deepcopy(dense).half()
    half.conv_out.weight.data.fill_(6e-8)  # float16's least number; a training step takes many weights below half of it
    monkeypatch.setattr(recovery, "LEARNING_RATE", 5e-8)
    monkeypatch.setattr(recovery, "WARMUP_STEPS", 1)
    denoiser, pruned = recovered(half, 0.1, calls)
    assert pruned.taken == pruned.asked == zeros(denoiser)


def test_a_sweep_that_resumes_and_a_single_rate_give_the_same_bits(dense, calls, tmp_path):
    path = tmp_path / "deep" / "unet.checkpoint.safetensors"
    for rate in (0.1, 0.2, 0.25, 0.3):
        resumed, pruned = recovered(dense, rate, calls, checkpoint=path)
        single, expected = recovered(dense, rate, calls)
        assert pruned == expected
        assert equal(resumed, single)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_resumed_schedule_trains_only_the_rates_that_are_left(dense, calls, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    trained = []
    recover = recovery.recover
    monkeypatch.setattr(recovery, "recover", lambda *arguments: trained.append(1) or recover(*arguments))
    for rate, expected in ((0.2, 2), (0.2, 0), (0.3, 1), (3 * 0.1, 0), (0.35, 1), (0.2, 2)):
        trained.clear()
        recovered(dense, rate, calls, checkpoint=path)
        assert len(trained) == expected, rate


def test_a_half_precision_sweep_resumes_in_full_precision(dense, calls, tmp_path):
    half = copy.deepcopy(dense).half()
    recovered(half, 0.1, calls, checkpoint=tmp_path / "checkpoint")
    resumed, _ = recovered(half, 0.2, calls, checkpoint=tmp_path / "checkpoint")
    assert equal(resumed, recovered(half, 0.2, calls)[0])


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"no safetensors"),
    lambda path: path.write_bytes(path.read_bytes()[:-8]),
    lambda path: save_file({"x": torch.zeros(3)}, path),
    lambda path: save_file({"x": torch.zeros(3)}, path, metadata={"rate": "0.1", "provenance": "another"}),
    lambda path: path.unlink(),
])
def test_a_file_that_is_no_checkpoint_is_ignored_and_replaced(dense, calls, tmp_path, spoil):
    path = tmp_path / "checkpoint.safetensors"
    recovered(dense, 0.1, calls, checkpoint=path)
    spoil(path)
    denoiser, _ = recovered(dense, 0.2, calls, checkpoint=path)
    assert equal(denoiser, recovered(dense, 0.2, calls)[0])
    assert "conv_in.weight" in load_file(path)


def test_a_checkpoint_of_another_schedule_is_ignored(dense, calls, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    other = copy.deepcopy(dense)
    other.conv_in.weight.data += 0.1
    for options in ({"seed": 1}, {"scope": "global"}, {"calls": calls[:-1]}, {"dense": other}):
        arguments = dict({"dense": dense, "calls": calls}, **options)
        recovered(rate=0.1, checkpoint=path, **arguments)
        denoiser, _ = recovered(dense, 0.1, calls, checkpoint=path)
        assert equal(denoiser, recovered(dense, 0.1, calls)[0]), options


def test_pruned_weights_stay_pruned_and_kept_weights_adapt(dense, calls):
    state = {}
    for rate in (0.1, 0.2, 0.3):
        denoiser, _ = recovered(dense, rate, calls)
        for name, weight in zeroing.prunable_weights(denoiser).items():
            gone = weight == 0
            assert gone[state.get(name, torch.zeros_like(gone))].all()
            assert not torch.equal(weight[~gone], dict(dense.named_parameters())[name][~gone])
            state[name] = gone
    assert not torch.equal(denoiser.conv_out.bias, dense.conv_out.bias)
    assert not torch.equal(denoiser.conv_norm_out.weight, dense.conv_norm_out.weight)


@pytest.mark.parametrize("scope", SCOPES)
def test_recovery_brings_the_answers_nearer_to_the_dense_denoiser(dense, calls, scope, monkeypatch):
    monkeypatch.setattr(recovery, "LEARNING_RATE", 2e-3)  # few steps must suffice here
    monkeypatch.setattr(recovery, "WARMUP_STEPS", 1)
    denoiser, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    prune("iterative", denoiser, 0.5, scope=scope, recovery_steps=4, calibration=calibrated(calls))
    prune("magnitude", masked, 0.5, scope=scope)
    assert loss(dense, calls) < 1e-10
    assert loss(denoiser, calls) < 0.8 * loss(masked, calls)


def test_calls_with_nested_and_half_precision_tensors_are_matched_to_the_denoiser(dense, calls):
    def halved(kwargs):
        return {name: value.half() if torch.is_tensor(value) and value.is_floating_point() else value
                for name, value in kwargs.items()}

    nested = [(dict(halved(kwargs), return_dict=True, added_cond_kwargs={"unused": (torch.zeros(1).half(), "x")}),
               target.half()) for kwargs, target in calls]
    _, pruned = recovered(dense, 0.1, nested)
    assert pruned.taken == pruned.asked


def test_modes_flags_and_gradients_are_as_they_were(dense, calls):
    denoiser = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    denoiser.conv_in.weight.requires_grad_(False)
    with torch.no_grad():  # also if the caller's gradients are off
        prune("iterative", denoiser, 0.1, recovery_steps=1, calibration=calibrated(calls))
    assert not any(module.training for module in denoiser.modules())
    assert [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad] == [
        "conv_in.weight"]
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("options", "message"), [
    ({"rate": 0.1}, "iterative needs recorded calls"),
    ({"rate": 0.1, "recovery_steps": -1}, "recovery_steps"),
    ({"rate": 1.5}, "rate"),
    ({"rate": 0.1, "scope": "layers"}, "did you mean 'layer'"),
])
def test_bad_input_is_refused_and_nothing_is_pruned(dense, options, message):
    denoiser = copy.deepcopy(dense)
    with pytest.raises(UserError, match=message):
        prune("iterative", denoiser, **options)
    assert equal(denoiser, dense)


def test_calls_that_are_missing_or_not_finite_are_refused_and_nothing_is_pruned(dense, calls):
    infinite = [(kwargs, target * float("inf")) for kwargs, target in calls]
    for given, message in (([], "there are no calls"), (infinite, "gives NaN or infinity")):
        denoiser = copy.deepcopy(dense)
        with pytest.raises(UserError, match=message):
            prune("iterative", denoiser, 0.1, recovery_steps=STEPS, calibration=calibrated(given))
        assert equal(denoiser, dense)


def test_a_recovery_whose_loss_is_not_finite_is_refused(dense, calls):
    denoiser = copy.deepcopy(dense)
    denoiser.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(UserError, match="the loss of the recovery is not finite"):
        recovered(denoiser, 0.1, calls)


def test_rates_next_to_a_rate_of_the_schedule_are_that_rate():
    assert iterative.schedule(3 * 0.1) == [0.1, 0.2, 0.3]
    assert iterative.schedule(0.25) == [0.1, 0.2, 0.25]
    assert iterative.schedule(0.05) == [0.05]


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 0.3, "recovery_steps": 0}])
def test_no_calls_are_recorded_if_there_is_nothing_to_recover(dense, options):
    def record():
        raise AssertionError("recorded")
    prune("iterative", copy.deepcopy(dense), calibration=Calibration(record, 0), **options)


# ---- recovery as a step of any method

def test_a_denoiser_with_units_removed_can_recover(dense, calls, monkeypatch):
    monkeypatch.setattr(muon, "MATRIX_RATE", 0.03)  # few steps must suffice here
    monkeypatch.setattr(recovery, "WARMUP_STEPS", 1)
    denoiser = copy.deepcopy(dense).half()
    prune("structured", denoiser, 0.5, criterion="norm", refit=False)
    before, shapes = loss(denoiser.float(), calls), [p.shape for p in denoiser.parameters()]
    recovery.recover(denoiser.half(), {}, calibrated(calls), 4, "0")
    assert [p.shape for p in denoiser.parameters()] == shapes
    assert {p.dtype for p in denoiser.parameters()} == {torch.float16}
    assert loss(denoiser.float(), calls) < 0.8 * before


def test_recovery_holds_the_zeros_of_the_given_weights_and_trains_the_others(dense, calls):
    denoiser = copy.deepcopy(dense)
    held, free = denoiser.conv_in.weight, denoiser.conv_out.weight
    for weight in (held, free):
        weight.data[0] = 0
    recovery.recover(denoiser, {"conv_in.weight": held}, calibrated(calls), STEPS, "0")
    assert (held[0] == 0).all()
    assert (held[1:] != 0).all()
    assert (free[0] != 0).any()


def test_the_seed_of_a_recovery_decides_its_result(dense, calls):
    def weights(seed):
        denoiser = copy.deepcopy(dense)
        prune("magnitude", denoiser, 0.5)
        recovery.recover(denoiser, zeroing.prunable_weights(denoiser), calibrated(calls), STEPS, seed)
        return denoiser.conv_in.weight
    assert torch.equal(weights("1"), weights("1"))
    assert not torch.equal(weights("1"), weights("2"))
