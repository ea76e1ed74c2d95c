"""How images come out of a pipeline: prompts are encoded once, and a full GPU is met by halves."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pruning import UserError, data
from pruning.models import pipelines

SETTINGS = dict(seed=0, steps=2, guidance_scale=4.0, image_size=64)


class Crowded(StableDiffusionPipeline):
    """A pipeline on a GPU that has memory for two images; it keeps how many each call asked for."""

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


def test_a_batch_too_large_for_the_gpu_is_made_by_halves_with_a_line_that_says_so(crowded, capsys):
    samples = data.load_samples("shapes", 6)[0]
    made = pipelines.generate(crowded, samples, batch_size=6, **SETTINGS).pixels.astype(int)
    assert crowded.asked == (6, 3, 1, 2, 3, 1, 2)
    said = capsys.readouterr()
    assert "no GPU memory for 6 images at once: going on by halves, as --batch_size 3 would" in said.out + said.err
    crowded.room = 6
    whole = pipelines.generate(crowded, samples, batch_size=6, **SETTINGS).pixels.astype(int)
    assert abs(made - whole).max() <= 1


def test_one_image_too_large_for_the_gpu_is_an_error_with_remedies(crowded):
    crowded.room = 0
    with pytest.raises(UserError, match="no memory for one image; try --offload"):
        pipelines.generate(crowded, data.load_samples("shapes", 2)[0], batch_size=2, **SETTINGS)


def test_the_largest_batch_that_fits_is_found(crowded, monkeypatch):
    sample = data.load_samples("shapes", 1)[0][0]
    assert pipelines.fitting_batch_size(crowded, sample, "cpu", 4.0, 64) == 8
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for room, size in ((40, 32), (5, 4), (0, 1)):
        crowded.room = room
        assert pipelines.fitting_batch_size(crowded, sample, "cuda", 4.0, 64) == size


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_prompts_are_encoded_once_and_images_are_the_same(model):
    pipeline = pipelines.load_pipeline(model)
    samples = data.load_samples("shapes", 3)[0]
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    before = pipelines.generate(pipeline, samples, batch_size=3, **SETTINGS).pixels
    each = len(calls)
    pipelines.remember_prompts(pipeline)
    for _ in range(3):
        assert np.array_equal(pipelines.generate(pipeline, samples, batch_size=3, **SETTINGS).pixels, before)
    assert len(calls) == 2 * each
    pipelines.generate(pipeline, samples[::-1], batch_size=3, **SETTINGS)
    assert len(calls) == 3 * each


def test_prompts_beyond_the_memory_set_aside_for_them_are_encoded_anew():
    pipeline = pipelines.load_pipeline("shapes-unet")
    calls = []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    pipelines.remember_prompts(pipeline, most_bytes=10)
    samples = data.load_samples("shapes", 2)[0]
    counts = []
    for _ in range(2):
        pipelines.generate(pipeline, samples, batch_size=2, **SETTINGS)
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]
