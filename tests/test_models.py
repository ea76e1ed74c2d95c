"""Images come out of a pipeline with prompts encoded once, by halves if the GPU is full, and compiled if asked for."""
from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pruning import UserError, data
from pruning.models import compiling, generation, pipelines

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(seed=0, steps=2, guidance_scale=4.0, image_size=64)


class Crowded(StableDiffusionPipeline):
    """A pipeline on a GPU with memory for two images. `asked` holds the number of images of each call."""

    room, asked = 2, ()

    def __call__(self, prompt, **kwargs):
        self.asked = (*self.asked, len(prompt))
        if len(prompt) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return super().__call__(prompt, **kwargs)


@pytest.fixture
def crowded():
    pipeline = pipelines.load_pipeline("shapes-unet")
    pipeline.__class__ = Crowded
    return pipeline


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_stays_so_that_the_next_call_need_not_ask_the_system_for_it():
    program = """
import resource, torch
from pruning.models import generation
generation.keep_freed_memory()
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    outputs = [torch.ones(3 * 2 ** 21) for _ in range(3)]  # blocks of 24 MiB
    del outputs
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=str(ROOT), check=True)
    pages = 3 * 3 * 2 ** 23 // resource.getpagesize()
    assert int(done.stdout) < pages / 100


def test_a_batch_too_large_for_the_gpu_is_made_by_halves_with_a_line_that_says_so(crowded, capsys):
    samples = data.load_samples("shapes", 6)[0]
    made = generation.generate(crowded, samples, batch_size=6, **SETTINGS).pixels.astype(int)
    assert crowded.asked == (6, 3, 1, 2, 3, 1, 2)
    printed = capsys.readouterr()
    assert "no GPU memory for 6 images at once: continuing with halves" in printed.out + printed.err
    crowded.room = 6
    whole = generation.generate(crowded, samples, batch_size=6, **SETTINGS).pixels.astype(int)
    assert abs(made - whole).max() <= 1


def test_one_image_too_large_for_the_gpu_is_an_error_with_remedies(crowded):
    crowded.room = 0
    with pytest.raises(UserError, match="no memory for one image; try --offload"):
        generation.generate(crowded, data.load_samples("shapes", 2)[0], batch_size=2, **SETTINGS)


def test_the_largest_batch_that_fits_is_found(crowded, monkeypatch):
    sample, one = data.load_samples("shapes", 1)[0][0], {"steps": 2, "guidance_scale": 4.0, "image_size": 64}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for room, size in ((40, 32), (5, 4), (0, 1)):
        crowded.room = room
        assert generation.fitting_batch_size(crowded, sample, 50, "cuda", **one) == size


def test_a_batch_size_without_gpu_memory_for_it_is_halved_before_anything_is_timed(crowded, monkeypatch, capsys):
    sample, one = data.load_samples("shapes", 1)[0][0], {"steps": 2, "guidance_scale": 4.0, "image_size": 64}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    crowded.room = 6
    assert generation.fitting_batch_size(crowded, sample, 50, "cuda", 24, **one) == 6
    printed = capsys.readouterr()
    for size, half in ((24, 12), (12, 6)):
        assert f"no GPU memory for {size} images at once: continuing with halves, as --batch_size {half} would" in (
            printed.out + printed.err)
    crowded.asked = ()
    assert generation.fitting_batch_size(crowded, sample, 6, "cuda", 24, **one) == 24  # six images are one batch
    assert crowded.asked == (6,)
    assert generation.fitting_batch_size(crowded, sample, 50, "cpu", 24, **one) == 24


@pytest.mark.parametrize("fastest", [8, 16, 32])
def test_on_a_cpu_the_batch_is_the_fastest_of_those_that_the_images_and_their_size_allow(fastest, monkeypatch):
    pipeline, sample = pipelines.load_pipeline("shapes-unet"), data.load_samples("shapes", 1)[0][0]

    def slow_when_larger(denoisers, call, rounds):
        latents = len(call["sample"])
        return [0.05 if latents <= 2 * fastest else 0.01 * latents] * len(denoisers)  # guidance: two latents an image

    monkeypatch.setattr(generation, "denoiser_seconds", slow_when_larger)
    one = {"steps": 2, "guidance_scale": 4.0, "image_size": 64}
    assert generation.fitting_batch_size(pipeline, sample, 50, "cpu", **one) == fastest
    assert generation.fitting_batch_size(pipeline, sample, 9, "cpu", **one) == min(fastest, 16)
    assert generation.fitting_batch_size(pipeline, sample, 8, "cpu", **one) == 8
    assert generation.fitting_batch_size(pipeline, sample, 50, "cpu", **{**one, "image_size": 1024}) == 2


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_prompts_are_encoded_once_and_images_are_the_same(model):
    pipeline = pipelines.load_pipeline(model)
    samples = data.load_samples("shapes", 3)[0]
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    before = generation.generate(pipeline, samples, batch_size=3, **SETTINGS).pixels
    each = len(calls)
    generation.remember_prompts(pipeline)
    for _ in range(3):
        assert np.array_equal(generation.generate(pipeline, samples, batch_size=3, **SETTINGS).pixels, before)
    assert len(calls) == 2 * each
    generation.generate(pipeline, samples[::-1], batch_size=3, **SETTINGS)
    assert len(calls) == 3 * each


def test_prompts_beyond_the_memory_for_them_are_encoded_again(monkeypatch):
    monkeypatch.setattr(generation, "PROMPT_BYTES", 10)
    pipeline = pipelines.load_pipeline("shapes-unet")
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    generation.remember_prompts(pipeline)
    samples = data.load_samples("shapes", 2)[0]
    counts = []
    for _ in range(2):
        generation.generate(pipeline, samples, batch_size=2, **SETTINGS)
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


class Narrow(torch.nn.Module):
    """Two layers with `width` neurons between them."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, width), torch.nn.Linear(width, 4)

    def forward(self, x):
        """(n, 4) -> (n, 4)."""
        return self.second(self.first(x).relu())


def observe(calls, denoiser, *shape):
    with torch.no_grad():
        calls.observe(lambda: denoiser(torch.zeros(*shape, 4)))


def test_denoisers_of_many_widths_all_run_compiled_one_after_the_other():
    for width in range(3, 15):
        compiling.forget_compiled()
        denoiser = Narrow(width)
        calls = compiling.compile_denoiser(denoiser, backend="eager")
        for count in (8, 5, 8):
            observe(calls, denoiser, count)
        assert calls.compiled


def test_a_denoiser_that_falls_back_to_plain_execution_is_told(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 1)
    compiling.forget_compiled()
    denoiser = Narrow(3)
    calls = compiling.compile_denoiser(denoiser, backend="eager")
    observe(calls, denoiser, 8)
    assert calls.compiled
    observe(calls, denoiser, 8, 2)  # a second version of the code, beyond the limit
    assert not calls.compiled


def test_hooks_that_were_set_after_compiling_are_called_where_a_denoiser_is_uncompiled():
    compiling.forget_compiled()
    denoiser, called = Narrow(3), []
    calls = compiling.compile_denoiser(denoiser, backend="eager")
    observe(calls, denoiser, 8)
    hook = denoiser.first.register_forward_hook(lambda *_: called.append("first"))
    with compiling.uncompiled(denoiser):
        observe(calls, denoiser, 8)
    assert called == ["first"]
    hook.remove()
    observe(calls, denoiser, 8)
    assert calls.observed == [1, 0, 1]


def test_a_copy_on_a_device_is_equal_apart_and_tied_as_the_original():
    original = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    original[2].weight = original[0].weight
    original[1].weight.requires_grad_(False)
    copied = pipelines.copy_to(original, "cpu")
    state = copied.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert copied[2].weight is copied[0].weight
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in original.parameters()]
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in original.parameters()}
    assert {str(p.device) for p in pipelines.copy_to(original, "meta").parameters()} == {"meta"}


def test_what_was_lent_to_a_device_is_again_where_it_waited_even_after_an_error():
    """Another type of numbers stands in for another device."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3, affine=False))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}

    def use():
        with pipelines.lent_to(module, torch.float64):
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
            raise KeyError

    pytest.raises(KeyError, use)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert module[0].weight.dtype == torch.float32
