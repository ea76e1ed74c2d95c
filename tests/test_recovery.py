"""Recovery at size: several processes, mixed precision, calls on disk, and the memory that is reckoned beforehand."""
from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from test_iterative import STEPS, calibrated, equal, unet, zeros
from test_surgery import build, call_of

from pruning import UserError
from pruning.methods import METHODS, bypass, muon, prune, reckoning, recovery, zeroing
from pruning.methods.calibration import Calibration, answer, read_calls, write_calls
from pruning.methods.moments import hooked
from pruning.metrics.costs import most_allocated

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import sys
import torch
sys.path[:0] = [{tests!r}, {root!r}]
from pruning import distributed
from pruning.methods import iterative, prune, recovery
from pruning.methods.calibration import Calibration
from test_recovery import dense_and_calls, lent

for method in ("iterative", "structured"):
    denoiser, calls = dense_and_calls()
    options = dict(criterion="norm", refit=False) if method == "structured" else {{}}
    known = Calibration(lambda: calls, 0, lend=lent(denoiser))
    prune(method, denoiser, 0.2, recovery_steps=3, calibration=known, **options)
    torch.save(denoiser.state_dict(), f"{{sys.argv[1]}}/{{method}}-{{distributed.rank}}.pt")
"""


def dense_and_calls(dtype=torch.float32, count=5, latents=2):
    """A small UNet, and what it answers to noise."""
    denoiser, calls = unet().to(dtype), []
    for index in range(count):
        kwargs = {"sample": torch.randn(latents, 4, 8, 8, dtype=dtype), "timestep": torch.tensor(100 * index + 50),
                  "encoder_hidden_states": torch.randn(latents, 3, 8, dtype=dtype)}
        with torch.no_grad():
            calls.append((kwargs, denoiser(**kwargs).sample))
    return denoiser, calls


def lent(denoiser):
    """A calibration's way to lend a copy of a denoiser, which is there already."""
    dense = copy.deepcopy(denoiser)
    return lambda device: nullcontext(dense)


def train_in_processes(count, folder):
    """Prune and recover in so many processes, each of which writes its weights."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    code = TRAIN.format(tests=str(ROOT / "tests"), root=str(ROOT))
    running = [subprocess.Popen([sys.executable, "-c", code, str(folder)], env={**shared, "RANK": str(rank)},
                                stderr=subprocess.PIPE, text=True) for rank in range(count)]
    for process in running:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err


@pytest.mark.parametrize("processes", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 5))])
def test_several_processes_train_the_weights_that_one_trains_to_1e_4_and_are_equal_among_themselves(
        processes, tmp_path):
    """Five processes are more than a step has calls."""
    train_in_processes(processes, tmp_path)
    for method, options in (("iterative", {}), ("structured", {"criterion": "norm", "refit": False})):
        alone, calls = dense_and_calls()
        known = Calibration(lambda calls=calls: calls, 0, lend=lent(alone))
        prune(method, alone, 0.2, recovery_steps=3, calibration=known, **options)
        first, *others = (torch.load(str(tmp_path / f"{method}-{rank}.pt"), weights_only=True)
                          for rank in range(processes))
        for name, weight in alone.state_dict().items():
            assert all(torch.equal(first[name], other[name]) for other in others)
            assert torch.equal(first[name] == 0, weight == 0)
            assert (first[name] - weight).abs().max() < 1e-4  # AdamW magnifies what rounding does to small gradients
    dense, _ = dense_and_calls()
    assert not equal(dense, alone)


class EachStep:
    """In place of a progress bar: calls a function after each step."""

    def __init__(self, look):
        self.update = look

    def set_postfix(self, **_):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "structured"])
def test_masks_and_shapes_hold_after_each_step_and_weights_are_float32_while_they_train(method, dtype):
    denoiser, calls = dense_and_calls(dtype)
    prune(method, denoiser, 0.5, **({"criterion": "norm", "refit": False} if METHODS[method].removes else {}))
    weights = {} if METHODS[method].removes else zeroing.prunable_weights(denoiser)
    gone, shapes = {name: weight == 0 for name, weight in weights.items()}, [p.shape for p in denoiser.parameters()]
    before, steps = zeros(denoiser), []

    def look():
        steps.append([parameter.detach().clone() for parameter in denoiser.parameters()])
        assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
        assert [parameter.shape for parameter in denoiser.parameters()] == shapes
        assert all(torch.equal(weight == 0, gone[name]) for name, weight in weights.items())

    recovery.recover(denoiser, weights, calibrated(calls), STEPS, "0", EachStep(look))
    assert len(steps) == STEPS
    assert any(not torch.equal(one, other) for one, other in zip(*steps[:2]))
    assert {parameter.dtype for parameter in denoiser.parameters()} == {dtype}
    assert METHODS[method].removes or zeros(denoiser) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_calls_recorded_in_half_precision_are_computed_in_bfloat16(dtype):
    denoiser, calls = dense_and_calls(dtype)
    seen = []
    with recovery.full_precision(denoiser, {}):
        hook = denoiser.conv_in.register_forward_hook(lambda layer, _, output: seen.append((layer.weight.dtype,
                                                                                            output.dtype)))
        loss = recovery.distillation_loss(denoiser, *calls[0])
        hook.remove()
    assert seen == [(torch.float32, torch.float32 if dtype == torch.float32 else torch.bfloat16)]
    assert loss.dtype == torch.float32
    assert loss < 1e-3


@pytest.mark.parametrize(("first_batch", "guidance"), [(1, 4.0), (2, None)])
def test_the_loss_counts_the_guided_output_too_if_a_call_holds_both_halves_of_it(first_batch, guidance, monkeypatch):
    denoiser, calls = dense_and_calls()
    kwargs, target = calls[0]
    error = torch.randn_like(target)
    unconditional, conditional = error
    guided = 4 * conditional - 3 * unconditional if guidance else torch.zeros(1)
    assert torch.allclose(recovery.distillation_loss(denoiser, kwargs, target - error, guidance),
                          error.square().mean() + guided.square().mean())

    given, gradients = [], recovery.add_gradients
    monkeypatch.setattr(recovery, "add_gradients", lambda model, chosen, scale, teacher: given.append(scale)
                        or gradients(model, chosen, scale))
    recovery.recover(denoiser, {}, Calibration(lambda: calls, 0, guidance_scale=4.0, first_batch=first_batch), 1, "0")
    assert given == [guidance]


def test_each_block_of_a_unet_that_is_not_bypassed_learns_what_it_gives_in_the_dense_denoiser():
    dense, calls = dense_and_calls()
    known, denoiser = Calibration(lambda: calls, 0, lend=lent(dense)), copy.deepcopy(dense)
    found = bypass.find(dense, calls[0][0])
    first = next(iter(found))
    with recovery.taught(denoiser, known) as teacher:
        assert set(found) <= set(teacher.blocks)
        assert recovery.distillation_loss(denoiser, *calls[0], None, teacher) < 1e-10
    bypass.take_out(denoiser, {first: found[first]})
    with recovery.taught(denoiser, known) as teacher:
        assert first not in teacher.blocks
        loss = recovery.distillation_loss(denoiser, *calls[0], None, teacher)
    given = {}
    for model in (dense, denoiser):
        given[model] = []
        with hooked(model.get_submodule(name).register_forward_hook(
                lambda _block, _inputs, output, model=model: given[model].append(output)) for name in teacher.blocks):
            sample = answer(model, calls[0][0])
        given[model] = [output[0] if isinstance(output, tuple) else output for output in given[model]]
    errors = [(own - aim).square().mean() / aim.var() for own, aim in zip(given[denoiser], given[dense])]
    assert len(errors) == len(teacher.blocks) > 2
    samples = (sample - calls[0][1]).square().mean()
    assert torch.allclose(loss, samples + recovery.BLOCKS * sum(errors) / len(errors), rtol=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_a_transformer_has_no_teacher_and_no_dense_denoiser_is_lent():
    denoiser = build("sd3")
    with recovery.taught(denoiser, Calibration(list, 0, lend=lambda device: pytest.fail("lent"))) as teacher:
        assert teacher is None


def test_blocks_learn_in_every_step_and_come_nearer_to_those_of_dense(monkeypatch):
    dense, calls = dense_and_calls()
    monkeypatch.setattr(recovery, "WARMUP_STEPS", 1)
    losses, given, gradients = {}, [], recovery.add_gradients
    monkeypatch.setattr(recovery, "add_gradients", lambda model, chosen, guidance, teacher: given.append(teacher)
                        or gradients(model, chosen, guidance, teacher))
    for lend in (None, lent(dense)):
        denoiser = copy.deepcopy(dense)
        prune("magnitude", denoiser, 0.5, recovery_steps=20, calibration=Calibration(lambda: calls, 0, lend=lend))
        with recovery.taught(denoiser, Calibration(lambda: calls, 0, lend=lent(dense))) as teacher:
            losses[lend is None] = sum(recovery.distillation_loss(denoiser, *call, None, teacher).item() -
                                       recovery.distillation_loss(denoiser, *call).item() for call in calls)
    assert [teacher is None for teacher in given] == [True] * 20 + [False] * 20
    assert losses[False] < 0.9 * losses[True]


def test_recovery_draws_anew_every_few_steps_and_takes_half_of_its_calls_from_the_last_drawing(monkeypatch):
    monkeypatch.setattr(recovery, "VISIT_STEPS", 2)
    denoiser, calls = dense_and_calls(count=6)
    recorded, own = calls[:4], calls[4:]
    denoiser.conv_in.weight.data.zero_()  # so that there is something to learn
    seen, events, steps = [], [], []

    @contextmanager
    def visit(visiting, number):
        events.append(f"drawing {number}")
        seen.append(visiting.conv_in.weight.detach().clone())
        yield [own[number], own[number]]
        events.append("over")

    gradients = recovery.add_gradients
    monkeypatch.setattr(recovery, "add_gradients", lambda model, chosen, guidance, teacher: steps.append(
        [[torch.equal(target, known) for _, known in calls].index(True) for _, target in chosen])
        or events.append("step") or gradients(model, chosen, guidance))
    recovery.recover(denoiser, {}, Calibration(lambda: recorded, 0, visit=visit), 5, "0")
    assert events == ["drawing 0", *3 * ["step"], "over", "drawing 1", *2 * ["step"], "over"]
    assert [step[:2] for step in steps] == 3 * [[4, 4]] + 2 * [[5, 5]]
    assert all(len(set(step[2:])) == 2 and max(step[2:]) < 4 for step in steps)
    assert len({tuple(step) for step in steps}) > 2
    assert not torch.equal(*seen)


# ---- calls on disk

def anonymous_memory():
    """Bytes of this process that no file backs, so that the system cannot take them back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_recovery_from_calls_on_disk_equals_that_from_memory(tmp_path):
    denoiser, calls = dense_and_calls()
    write_calls(calls, tmp_path / "calls.pt")
    models = [copy.deepcopy(denoiser) for _ in range(2)]
    for model, known in zip(models, (calls, read_calls(tmp_path / "calls.pt"))):
        prune("magnitude", model, 0.5, recovery_steps=STEPS, calibration=calibrated(known))
    assert equal(*models)
    assert not equal(models[0], denoiser)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_calls_on_disk_are_not_held_in_memory(tmp_path):
    size, paths = 2 ** 24, [tmp_path / f"{number}.pt" for number in range(8)]
    for path in paths:
        write_calls([({"sample": torch.ones(size // 8)}, torch.ones(size // 8))], path)
    before = anonymous_memory()
    calls = [call for path in paths for call in read_calls(path)]
    assert sum(float(kwargs["sample"].sum() + target.sum()) for kwargs, target in calls) == len(paths) * size / 4
    assert anonymous_memory() - before < size  # of eight times as much


@pytest.mark.parametrize("content", [None, b"", b"no calls", "half"])
def test_a_file_that_holds_no_calls_is_none(tmp_path, content):
    path = tmp_path / "calls.pt"
    write_calls([({"sample": torch.zeros(3000)}, torch.ones(3000))], path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:9000] if content == "half" else content)
    assert read_calls(path) is None


# ---- the optimizer

def test_muon_trains_unets_of_which_units_were_removed_and_adamw_all_others(monkeypatch):
    dense, calls = dense_and_calls()
    used, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(recovery, "Muon", lambda every: used.append("Muon") or muon.Muon(every))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: used.append("AdamW") or adamw(*args, **kwargs))
    for denoiser, weights in ((dense, {}), (dense, zeroing.prunable_weights(dense)), (build("sd3"), {})):
        own = calls if denoiser is dense else [(call_of(denoiser), answer(denoiser, call_of(denoiser)).detach())]
        recovery.recover(denoiser, weights, calibrated(own), 1, "0")
    assert used == ["Muon", "AdamW", "AdamW"]


# ---- memory

@contextmanager
def free_memory(monkeypatch, size):
    """Inside the block, the machine has so many bytes free."""
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": int(size)}))
        yield


@pytest.mark.parametrize("teaches", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_reckoned_is_what_training_allocates(recompute, teaches):
    denoiser, calls = dense_and_calls(latents=6)
    known = Calibration(lambda: calls, 0, recompute=recompute, lend=lent(denoiser) if teaches else None)
    with recovery.training(denoiser, {}, known), recovery.taught(denoiser, known) as teacher:
        need = reckoning.without_activations(denoiser, by_muon=True)
        need = need._replace(activations=recovery.call_activations(denoiser, calls[0], 0, teacher=teacher))
        allocated = most_allocated(lambda: recovery.recover(denoiser, {}, known, 2, "0"), torch.device("cpu"))
    # In a denoiser as small as this, the second latent, by which the others are reckoned, takes less than they do.
    assert need.total - need.weights == pytest.approx(allocated, rel=0.2)
    assert need.activations > need.gradients


@pytest.mark.parametrize("method", ["magnitude", "iterative"])
def test_recovery_that_does_not_fit_is_refused_with_the_remedy_before_anything_changes(method, monkeypatch):
    dense, calls = dense_and_calls(latents=6)
    held = 4 * sum(parameter.numel() for parameter in dense.parameters())
    for free, remedy in ((2.9 * held, "recovery needs .*and activations on cpu, .*: give a device with more memory"),
                         (3.1 * held, "activations with gradient checkpointing .*: give a --batch_size below 3, or ")):
        denoiser, known = copy.deepcopy(dense), calibrated(calls)
        known.first_batch = 3
        with free_memory(monkeypatch, free), pytest.raises(UserError, match=remedy):
            prune(method, denoiser, 0.5, recovery_steps=STEPS, calibration=known)
        assert equal(denoiser, dense)
        assert not denoiser.is_gradient_checkpointing
    assert "--offload sequential" in reckoning.instead(torch.device("cuda"))


def test_gradient_checkpointing_comes_on_if_memory_is_short_and_changes_no_bit(monkeypatch):
    dense, calls = dense_and_calls(latents=6)
    needs = {}
    for recompute in (False, True):
        denoiser, known = copy.deepcopy(dense), calibrated(calls)
        known.recompute = recompute
        with recovery.training(denoiser, {}, known):
            assert denoiser.is_gradient_checkpointing is recompute
            needs[recompute] = recovery.call_activations(denoiser, calls[0], 0)
    assert needs[True] < 0.8 * needs[False]
    dense.conv_in.weight.data[:8] = 0  # so that there is something to train
    models = [copy.deepcopy(dense) for _ in range(2)]
    need = reckoning.without_activations(dense, by_muon=True)
    short = need.gradients + need.moments + sum(needs.values()) / 2
    for model, free in zip(models, (2 ** 34, short)):
        with free_memory(monkeypatch, free), recovery.training(model, {}, calibrated(calls)):
            assert model.is_gradient_checkpointing is (free == short)
            recovery.recover(model, {}, calibrated(calls), STEPS, "0")
        assert not model.is_gradient_checkpointing
    assert equal(*models)
    assert not equal(models[0], dense)
