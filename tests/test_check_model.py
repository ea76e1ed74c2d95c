"""What check_model says of a model is true, and it reads configs alone."""
from __future__ import annotations

import json
import shutil

import pytest

from pruning import UserError, check_model, data, methods
from pruning.methods import reach
from pruning.metrics import costs
from pruning.models import generation, pipelines, saving, skeleton

NORM = {"criterion": "norm", "refit": False}  # needs no calibration


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The bundled models without weights."""
    folder = tmp_path_factory.mktemp("configs")
    for name, model in pipelines.MODELS.items():
        shutil.copytree(model.folder, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_a_model_is_described_without_its_weights(model, configs, capsys):
    check_model.main(["--model", model, "--device", "cpu"])
    whole = capsys.readouterr().out
    flags = ["--steps", "20", "--guidance_scale", "4"]  # which only the bundled name knows
    check_model.main(["--model", str(configs / model), "--device", "cpu", *flags])
    without = capsys.readouterr().out
    assert without.split("a matrix product")[0] == whole.replace(model, str(configs / model), 1).split(
        "a matrix product")[0]
    assert "magnitude, iterative, reconstruct, wanda, sparsegpt" in whole


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_multiply_accumulates_are_near_those_of_a_real_call(model):
    pipeline = pipelines.load_pipeline(model)
    size = pipelines.sampling_settings(pipeline, model)["image_size"]
    call = generation.first_call(pipeline, data.load_samples("shapes", 1)[0], seed=0, steps=1, batch_size=1,
                                 guidance_scale=1.0, image_size=size)
    denoiser = pipelines.take_denoiser(pipeline)
    assert skeleton.count_macs(skeleton.load(model), size) == pytest.approx(costs.count_macs(denoiser, call), rel=0.1)


@pytest.mark.parametrize(("model", "method", "options"), [
    ("shapes-unet", "magnitude", {}), ("shapes-unet", "structured", NORM), ("shapes-mmdit", "attention_heads", NORM)])
def test_methods_reach_what_is_said_that_they_reach(model, method, options):
    denoiser = pipelines.take_denoiser(pipelines.load_pipeline(model))
    pruned = methods.prune(method, denoiser, 0.1, **options)
    found = skeleton.load(model)
    assert reach.by_method(found.parts[found.denoiser])[method] == pruned.reached


def test_a_pruned_folder_is_described_as_it_is(tmp_path):
    pipeline = pipelines.load_pipeline("shapes-unet")
    methods.prune("structured", pipeline.unet, 0.5, **NORM)
    saving.save(pipeline, "unet", tmp_path / "pruned", {"steps": 2, "guidance_scale": 4.0, "image_size": 64}, {}, {})
    found = skeleton.load(str(tmp_path / "pruned"))
    assert sum(p.numel() for p in found.parts["unet"].parameters()) == pipeline.unet.num_parameters()


def test_what_is_not_understood_is_named(configs, tmp_path, capsys):
    shutil.copytree(configs / "shapes-unet", tmp_path / "odd")
    index = json.loads((tmp_path / "odd" / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "NoSuchEncoder"]
    (tmp_path / "odd" / "model_index.json").write_text(json.dumps(index))
    check_model.main(["--model", str(tmp_path / "odd"), "--device", "cpu"])
    assert "Not counted: text_encoder (this environment has no transformers.NoSuchEncoder)" in " ".join(
        capsys.readouterr().out.split())
    (tmp_path / "odd" / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="the unet of model .* cannot be made of its config"):
        skeleton.load(str(tmp_path / "odd"))
