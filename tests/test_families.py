"""The command measures, prunes and saves pipelines of every supported family: tiny ones with random weights."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from families import FAMILIES, NEEDS_TORCH_25, OLD_TORCH, SIZE, SIZES
from PIL import Image

from pruning import UserError, data, test_single_rate
from pruning.methods import METHODS, PRUNING, recovery
from pruning.metrics import DEFAULT
from pruning.models import generation, pipelines, weights_files
from pruning.records import store
from pruning.records.record import read_record

# Tiny models hold little that units could save, and one of the two heads of Kandinsky 5 saves nearly half. Some have
# one block alone.
RATE = {"joint": 0.2, ("kandinsky5", "joint"): 0.45, ("sana_sprint", "joint"): 0.45, ("auraflow", "modulation"): 0.9,
        **{(family, "blocks"): 0.6 for family in ("qwen_image", "sana_sprint", "omnigen", "cogview4")}}
UNFELT = {("qwen_image", "joint"), ("qwen_image", "modulation")}  # the images of the tiny model stay as they are
WITHOUT = {(family, "modulation") for family in ("sd15", "sdxl", "chroma", "sana_sprint")}  # they have no AdaLN layers
QUICK = ("sd3", "structured")  # the only pair of a family and a method that is not slow


def rate_of(family, method):
    return RATE.get((family, method), RATE.get(method, 0.5))


def marks(family):
    return [pytest.mark.skipif(OLD_TORCH, reason="needs torch 2.5")] if family.startswith(NEEDS_TORCH_25) else []


def of_families(*names):
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks(name)) for name in names])


@pytest.fixture(scope="module", params=[
    pytest.param((family, method), id=f"{family}-{method}",
                 marks=marks(family) + ([] if (family, method) == QUICK else [pytest.mark.slow]))
    for family in FAMILIES for method in PRUNING if (family, method) not in WITHOUT])
def measured(request, folder_of, tmp_path_factory):
    """The record that the command wrote, a function that loads its images, and the folder of the pruned pipeline."""
    family, method = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{method}")
    quick = ["--recovery_steps", "1"] if "recovery_steps" in METHODS[method].options else []
    quick += ["--calibration_images", "4"] if "calibration_images" in METHODS[method].options else []
    test_single_rate.main([
        "--model", str(folder_of(family)), "--method", method, "--rate", str(rate_of(family, method)),
        "--dataset", "shapes", "--num_images", "2", "--steps", "2", "--batch_size", "2",
        "--image_size", str(SIZES[family]), "--device", "cpu", "--results_dir", str(folder),
        "--save_pruned", str(folder / "pruned"), *quick])
    path, = (folder / family / "shapes").glob("*.json")
    record = read_record(path)
    assert (record.model, record.method) == (family, method)

    def load_images(rate):
        files = [store.image_file(path.parent / "images", record.variant, rate, index) for index in range(2)]
        return np.stack([np.asarray(Image.open(file)) for file in files])

    return record, load_images, folder / "pruned"


def settings(family="", **changed):
    size = SIZES.get(family, SIZE)
    return {**dict(seed=0, steps=2, guidance_scale=4.0, image_size=size, batch_size=2), **changed}


def scenes(count=2):
    return data.load_samples("shapes", count)[0]


def test_every_method_prunes_every_family_to_the_rate_asked_for(measured):
    record, _, _ = measured
    point, = record.points
    assert point.rate == rate_of(record.model, record.method)
    assert point.units_asked == round(point.rate * point.units_total) > 0
    if record.method == "joint":  # in tiny models a step saves much
        assert point.units_asked <= point.units_taken <= 1.3 * point.units_asked
    else:
        assert point.units_taken == point.units_asked
    assert point.sparsity == point.units_taken / point.units_total
    assert record.dense.sparsity == 0


def test_removal_saves_parameters_and_macs_and_masks_save_neither(measured):
    record, _, _ = measured
    dense, point = record.dense, record.points[0]
    for name in ("parameters", "weight_bytes", "macs"):
        if METHODS[record.method].removes:
            assert getattr(point, name) < getattr(dense, name)
        else:
            assert getattr(point, name) == getattr(dense, name)
    assert point.nonzero_parameters < dense.nonzero_parameters
    if not METHODS[record.method].removes:
        zeros = dense.nonzero_parameters - point.nonzero_parameters
        assert zeros == pytest.approx(point.units_taken, rel=0.01)  # training may move a bias away from zero or to zero


def test_every_metric_is_finite_and_pruning_changes_the_images(measured):
    record, _, _ = measured
    unfelt = (record.model, record.method) in UNFELT
    for point in (record.dense, *record.points):
        assert set(point.metrics) == set(DEFAULT)
        equal = point.rate == 0 or unfelt
        assert [name for name, value in point.metrics.items() if value is None] == ["psnr_dense"] * equal
        assert all(len(values) == 2 and (None in values) == (point.metrics[name] is None)
                   for name, values in point.per_image.items())
    assert record.dense.metrics["lpips_dense"] == 0
    assert unfelt or record.points[0].metrics["lpips_dense"] > 0


def test_the_images_have_the_size_asked_for_and_differ_from_each_other(measured):
    record, load_images, _ = measured
    dense, pruned = load_images(0), load_images(record.points[0].rate)
    assert dense.shape == pruned.shape == (2, SIZES[record.model], SIZES[record.model], 3)
    for images in (dense, pruned):
        assert images.std() > 5  # images of a single colour would be equal for every model
        assert (images[0] != images[1]).mean() > 0.5


def test_the_saved_pipeline_makes_the_same_images(measured):
    record, load_images, saved = measured
    pipeline = pipelines.load_pipeline(str(saved))
    sampling = {**pipelines.sampling_settings(pipeline, str(saved)), "seed": 0, "batch_size": 2}
    made = generation.generate(pipeline, scenes(), **sampling).pixels
    assert np.array_equal(made, load_images(record.points[0].rate))


@pytest.mark.slow
@of_families(*FAMILIES)
def test_the_default_image_size_is_that_of_the_pipeline(family, folder_of):
    pipeline = pipelines.load_pipeline(str(folder_of(family)))
    if family == "z_image":
        with pytest.raises(UserError, match="does not say what size its images have; give --image_size"):
            pipelines.sampling_settings(pipeline, str(folder_of(family)))
        return
    size = pipelines.sampling_settings(pipeline, str(folder_of(family)))["image_size"]
    # What the classes of their pipelines say. The tiny Hunyuan-DiT draws smaller images than its config says.
    own = {"flux": 128 * 4, "chroma": 128 * 4, "omnigen": 128 * 8, "qwen_image": 128 * 8, "kandinsky5": 1024,
           "hunyuan_dit": 64}
    assert size == next((each for name, each in own.items() if family.startswith(name)), SIZES[family])


@pytest.mark.slow
@of_families(*FAMILIES)
def test_noise_depends_on_the_sample_and_the_seed_alone(family, folder_of):
    pipeline = pipelines.load_pipeline(str(folder_of(family)))
    # In a batch, diffusers gives all captions of OmniGen the positions of the first, and lets Kandinsky 5 attend to the
    # filling of shorter ones. So these two take the first two captions, which are of equal length.
    samples = scenes(2 if family in ("omnigen", "kandinsky5") else 3)
    together = generation.generate(pipeline, samples, **settings(family, batch_size=3)).pixels.astype(int)
    apart = generation.generate(pipeline, samples[::-1], **settings(family, batch_size=1)).pixels.astype(int)[::-1]
    other = generation.generate(pipeline, samples, **settings(family, batch_size=3, seed=1)).pixels.astype(int)
    assert abs(together - apart).max() <= 1  # rounding depends on the batch size
    assert abs(together - other).max() > (18 if family == "qwen_image" else 20)


@pytest.mark.slow
@of_families(*FAMILIES)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-10), ("bfloat16", 1e-3)])
def test_the_dense_denoiser_gives_its_recorded_outputs_again(family, dtype, error, folder_of):
    """Dense has no loss except rounding, whether it was recorded in float32 or is computed in mixed precision."""
    pipeline = pipelines.load_pipeline(str(folder_of(family)), dtype=dtype)
    calls = generation.record_calls(pipeline, scenes(), **settings(family))
    denoiser = pipelines.take_denoiser(pipeline).float()
    assert len(calls) >= 2
    with torch.no_grad():
        for kwargs, target in calls:
            assert target.dtype == getattr(torch, dtype)
            assert recovery.distillation_loss(denoiser, kwargs, target) < error * target.float().var()


@of_families(*FAMILIES)
def test_whole_weights_are_recognised_without_loading_a_component_twice(family, folder_of, monkeypatch, capsys):
    differing, compare = [], weights_files.differing_names
    monkeypatch.setattr(weights_files, "differing_names",
                        lambda *given: differing.append(compare(*given)) or differing[-1])
    folder = folder_of(family)
    capsys.readouterr()  # saving shows progress
    pipelines.load_pipeline(str(folder))
    assert differing
    assert all(names == ([], []) for names in differing)
    assert capsys.readouterr().err == ""


@of_families("sd3", "flux_dev")
def test_an_image_size_that_the_pipeline_cannot_make_is_refused(family, folder_of):
    """The pipeline of sd3 raises an error itself. Flux rounds the size, so its images would match no original."""
    pipeline = pipelines.load_pipeline(str(folder_of(family)))
    with pytest.raises(UserError, match=f"{type(pipeline).__name__}.* {SIZE - 2} ?"):
        generation.generate(pipeline, scenes(), **settings(image_size=SIZE - 2))


class Unguided(StableDiffusionPipeline):
    """A pipeline that is sampled without guidance."""

    def __call__(self, prompt, num_inference_steps=4, **kwargs):
        return super().__call__(prompt, num_inference_steps=num_inference_steps, guidance_scale=1.0, **kwargs)


def test_a_guidance_scale_without_effect_is_refused(folder_of):
    pipeline = pipelines.load_pipeline(str(folder_of("sd15")))
    pipeline.__class__ = Unguided
    assert pipelines.sampling_settings(pipeline, "it", {"guidance_scale": None})["guidance_scale"] == 1
    with pytest.raises(UserError, match="Unguided takes no guidance scale"):
        pipelines.sampling_settings(pipeline, "it", {"guidance_scale": 4.0})


def test_a_model_of_unknown_image_size_needs_the_flag(folder_of):
    pipeline = pipelines.load_pipeline(str(folder_of("sd15")))
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(UserError, match="--image_size"):
        pipelines.sampling_settings(pipeline, "it")
    assert pipelines.sampling_settings(pipeline, "it", {"image_size": 64})["image_size"] == 64


@pytest.mark.skipif(not OLD_TORCH or torch.cuda.is_available(), reason="only for torch before 2.5 on the CPU")
@pytest.mark.parametrize("family", ["flux_dev", "flux_schnell", "chroma", "sana", "sana_sprint"])
def test_the_error_for_an_old_torch_names_the_version_that_a_family_needs(family, folder_of):
    with pytest.raises(UserError, match="torch 2.5"):
        pipelines.load_pipeline(str(folder_of(family)))
