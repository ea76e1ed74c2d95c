"""What a pipeline calls its inputs and outputs is found by its class's call and by what it says, for every class."""
from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import BaseOutput
from families import FAMILIES, NEEDS_TORCH_25, OLD_TORCH, SIZES

from pruning import UserError, data
from pruning.models import generation, pipelines, signature, skeleton

# How the names of classes begin that guidance_scale does not guide, and what guides them: also fixed scales, schedules
# and components.
OTHERS = {
    "QwenImage": "true_cfg_scale", "HunyuanSkyreels": "true_cfg_scale", "HunyuanVideoImageToVideo": "true_cfg_scale",
    "HunyuanImage": "distilled_guidance_scale",
    "StableCascadeCombined": "prior_guidance_scale", "WuerstchenCombined": "prior_guidance_scale",
    "DreamLiteMobile": None, "Flux2KleinKV": None, "Ideogram4": None, "HunyuanVideo15": None, "MotifVideo": None,
}
QUICK = ("sdxl", "flux_schnell", "z_image", "qwen_image")
EACH = pytest.mark.parametrize("family", [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES
    if not (OLD_TORCH and name.startswith(NEEDS_TORCH_25))])


@pytest.fixture(scope="module")
def kinds():
    """The text-to-image pipeline classes of the installed diffusers."""
    found = {}
    for name in dir(diffusers):
        with suppress(UserError, ImportError, RuntimeError, ValueError):  # ValueError: a class whose call is C code
            found[name] = signature.pipeline_class({"_class_name": name})
    found = {name: kind for name, kind in found.items() if issubclass(kind, DiffusionPipeline)}
    assert len(found) > 100
    return found


def output(**values):
    """An output as diffusers makes them, of these names and values."""
    kind = dataclasses.make_dataclass("MadeOutput", [(name, Any, None) for name in values], bases=(BaseOutput,))
    return kind(**values)


# ---- classes

def test_every_class_is_guided_by_the_argument_that_guides_it(kinds):
    found = {name: signature.guidance_argument(kind) for name, kind in kinds.items()}
    assert found == {name: next((guide for start, guide in OTHERS.items() if name.startswith(start)), "guidance_scale")
                     for name in kinds}


def test_every_class_is_called_with_arguments_that_it_takes(kinds):
    for kind in kinds.values():
        given = signature.arguments(kind, ["a", "b"], [None, None], steps=3, guidance_scale=4.0, image_size=64,
                                    output_type="np")
        assert set(given) - set(inspect.signature(kind.__call__).parameters) == set()
        assert given.get("use_resolution_binning", False) is False
        assert (given.get("negative_prompt") == [" ", " "]) == ("true_cfg_scale" in given)


def test_images_are_the_first_value_of_every_output_that_holds_images(kinds):
    checked = 0
    for kind in kinds.values():
        for name in re.findall(r"return (\w+Output)\(", inspect.getsource(inspect.unwrap(kind.__call__))):
            made = getattr(sys.modules[kind.__module__], name)
            names = [field.name for field in dataclasses.fields(made)]
            assert issubclass(made, dict)
            assert not {"images", "image"} & set(names[1:]), (kind, names)
            checked += names[0] in ("images", "image")
    assert checked > 50


# ---- outputs

@pytest.mark.parametrize("name", ["images", "image", "pictures"])
def test_images_are_taken_whatever_their_name(name):
    pixels, latents = np.zeros((2, 8, 8, 3)), torch.zeros(2, 4, 4)
    assert signature.images(StableDiffusionPipeline, output(**{name: pixels, "nsfw": [False]}), "np") is pixels
    assert signature.images(StableDiffusionPipeline, output(**{name: latents}), "latent") is latents


@pytest.mark.parametrize("made", [
    output(frames=np.zeros((2, 5, 8, 8, 3))), output(image_embeds=np.zeros((2, 77, 768))),
    output(image_embeddings=np.zeros((2, 16, 24, 24))), output(images=None), (np.zeros((2, 8, 8, 3)),)])
def test_an_output_without_images_is_one_line(made):
    with pytest.raises(UserError, match=f"^StableDiffusionPipeline gives {type(made).__name__}, which holds no RGB"):
        signature.images(StableDiffusionPipeline, made, "np")


# ---- pipelines, and the same without weights

class Saying:
    """A pipeline that says what it is told to say."""

    def __init__(self, **said):
        vars(self).update(said)

    def __call__(self, prompt, height=48, width=48):
        raise NotImplementedError


@pytest.mark.parametrize(("said", "sample_size", "size"), [
    ({"default_sample_size": 16, "vae_scale_factor": 8}, 4, 128), ({"vae_scale_factor": 8}, 4, 32),
    ({"vae_scale_factor": 8}, None, 48), ({}, 4, 48), ({"vae_scale_factor": 8}, [4, 4], 48)])
def test_the_image_size_is_what_the_pipeline_says_else_its_denoiser_else_its_class(said, sample_size, size):
    denoiser = SimpleNamespace(config={"sample_size": sample_size})
    assert signature.image_size(Saying(**said), denoiser) == size


def agree(model):
    """Check that a model's settings are the same whether it is loaded or only its configs are."""
    pipeline, found = pipelines.load_pipeline(model), skeleton.load(model)
    said = pipelines.said_settings(pipeline, model)
    assert pipelines.said_settings(found.pipeline, model) == said
    assert signature.latent_scale(found.pipeline) == signature.latent_scale(pipeline)
    assert skeleton.sampling(found, {}, model) == {**said, "image_size": said["image_size"] or 1024}


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_a_bundled_model_and_its_configs_say_the_same_settings(model):
    agree(model)


@EACH
def test_a_pipeline_and_its_configs_say_the_same_settings(family, folder_of):
    agree(str(folder_of(family)))


@EACH
def test_the_denoiser_runs_as_often_as_is_said(family, folder_of):
    folder = str(folder_of(family))
    pipeline, found = pipelines.load_pipeline(folder), skeleton.load(folder)
    runs = []
    denoiser = getattr(pipeline, pipelines.denoiser_name(pipeline))
    denoiser.register_forward_hook(lambda _module, _args, made: runs.append(len(made[0])))
    for scale in (4.0,) if family == "omnigen" else (1.0, 4.0):  # OmniGen runs with both at any scale
        runs.clear()
        generation.generate(pipeline, data.load_samples("shapes", 1)[0], seed=0, steps=2, guidance_scale=scale,
                            image_size=SIZES[family], batch_size=1)
        twice = signature.guides_twice(found.pipeline, found.parts[found.denoiser], scale)
        assert sum(runs) == 2 * (2 if twice else 1)


class Asking(StableDiffusionPipeline):
    """A pipeline that asks its tokenizer at once."""

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor,
                 requires_safety_checker=True):
        assert tokenizer.model_max_length
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor,
                         requires_safety_checker=requires_safety_checker)


def test_a_pipeline_that_cannot_be_made_without_a_tokenizer_says_what_its_class_says(monkeypatch):
    monkeypatch.setattr(diffusers, "StableDiffusionPipeline", Asking)
    found = skeleton.load("shapes-unet")
    assert type(found.pipeline) is Asking
    assert skeleton.sampling(found, {}, "shapes-unet") == {"image_size": 1024, "steps": 20, "guidance_scale": 4.0}
    assert signature.guides_twice(found.pipeline, found.parts["unet"], 4.0)
    assert not signature.guides_twice(found.pipeline, found.parts["unet"], 1.0)
    assert skeleton.count_macs(found, 64) > 0
