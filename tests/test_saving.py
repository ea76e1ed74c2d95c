"""A pruned pipeline is a folder that loads again and gives the same images. What the folder says is checked."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from pruning import UserError, data, methods, pruning_analysis, test_single_rate
from pruning.methods import bypass, precision, zeroing
from pruning.methods.calibration import Calibration, answer
from pruning.models import generation, pipelines, saving
from pruning.records.record import read_record

ROOT = Path(__file__).resolve().parents[1]
SAMPLING = {"steps": 2, "guidance_scale": 4.0, "image_size": 64}
NORM = {"criterion": "norm", "refit": False}  # needs no calibration
CASES = {
    "structured": ("structured", NORM), "attention_heads": ("attention_heads", NORM), "magnitude": ("magnitude", {}),
    "masked heads": ("attention_heads", {**NORM, "mask_only": True})}


def prune_and_save(folder, method="structured", rate=0.5, dtype="float32", model="shapes-unet", **options):
    pipeline = pipelines.load_pipeline(model, dtype=dtype)
    name = pipelines.denoiser_name(pipeline)
    methods.prune(method, getattr(pipeline, name), rate, **options)
    saving.save(pipeline, name, folder, SAMPLING, {"method": method, "rate": rate}, {})
    return pipeline


def bytes_of_numbers(file):
    """The size of a safetensors file without its header, whose length the first 8 bytes say."""
    content = file.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def images(pipeline):
    samples = data.load_samples("shapes", 2)[0]
    return generation.generate(pipeline, samples, seed=0, batch_size=2, **SAMPLING).pixels


def test_a_transformer_without_some_blocks_loads_in_diffusers_alone(tmp_path):
    """In a process that cannot import this project, from a folder whose config says fewer layers."""
    pipeline = pipelines.load_pipeline("shapes-mmdit")
    call = generation.first_call(pipeline, data.load_samples("shapes", 1)[0], seed=0, batch_size=1, **SAMPLING)
    bypass.take_out(pipeline.transformer, {"transformer_blocks.2": ["encoder_hidden_states", "hidden_states"]})
    saving.save(pipeline, "transformer", tmp_path / "pruned", SAMPLING, {"method": "blocks"}, {}, call)
    assert isinstance(pipeline.transformer.transformer_blocks[2], bypass.Bypass)  # the pipeline is as before
    expected = images(pipeline)
    assert np.array_equal(images(pipelines.load_pipeline(str(tmp_path / "pruned"))), expected)
    program = f"""if True:
        import sys, torch, numpy as np
        from diffusers import SD3Transformer2DModel
        model = SD3Transformer2DModel.from_pretrained({str(tmp_path / "pruned" / "transformer")!r}).eval()
        call = torch.load({str(tmp_path / "call.pt")!r})
        with torch.no_grad():
            torch.save(model(**call).sample, {str(tmp_path / "answer.pt")!r})
        print(len(model.transformer_blocks), any(name.startswith("pruning") for name in sys.modules))
    """
    torch.save({name: value for name, value in call.items() if name != "joint_attention_kwargs"}, tmp_path / "call.pt")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "False"]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "answer.pt"), answer(pipeline.transformer, call))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pruned"
    prune_and_save(folder, **NORM)
    return folder


@pytest.mark.parametrize(("case", "model"), [
    ("structured", "shapes-unet"), ("magnitude", "shapes-unet"), ("attention_heads", "shapes-mmdit"),
    *(pytest.param(case, model, marks=pytest.mark.slow) for case, model in [
        ("masked heads", "shapes-unet"), ("attention_heads", "shapes-unet"), ("structured", "shapes-mmdit"),
        ("magnitude", "shapes-mmdit"), ("masked heads", "shapes-mmdit")])])
def test_images_after_loading_in_another_process_are_the_same_bit_for_bit(tmp_path, case, model):
    method, options = CASES[case]
    pipeline = prune_and_save(tmp_path / "pruned", method, model=model, **options)
    program = f"""if True:
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import numpy as np
        from pruning.models.pipelines import load_pipeline
        from test_saving import images
        np.save({str(tmp_path / "images.npy")!r}, images(load_pipeline({str(tmp_path / "pruned")!r})))"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "images.npy"), images(pipeline))
    loaded = pipelines.take_denoiser(pipelines.load_pipeline(str(tmp_path / "pruned")))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in pipelines.take_denoiser(pipeline).named_parameters()}


def test_a_masked_model_is_read_by_diffusers_alone(tmp_path):
    pipeline = prune_and_save(tmp_path / "pruned", "magnitude", 0.9)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "pruned")
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(images(plain), images(pipeline))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_shrinks_as_the_parameters_do_and_no_number_changes(tmp_path, dtype):
    pipeline = prune_and_save(tmp_path / "pruned", dtype=dtype, **NORM)
    weights = "unet/diffusion_pytorch_model.safetensors"
    dense = pipelines.MODELS["shapes-unet"].folder / weights
    kept = pipelines.load_pipeline("shapes-unet").unet.num_parameters()
    share = (tmp_path / "pruned" / weights).stat().st_size / dense.stat().st_size
    assert share == pytest.approx(pipeline.unet.num_parameters() / kept, rel=0.01)
    assert saving.file_bytes(pipeline.unet) == bytes_of_numbers(tmp_path / "pruned" / weights)
    loaded = pipelines.load_pipeline(str(tmp_path / "pruned"), dtype=dtype).unet
    for (name, one), (_, other) in zip(pipeline.unet.named_parameters(), loaded.named_parameters()):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


def tiny_pipeline():
    """The bundled pipeline with a small random denoiser."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=8, block_out_channels=(16, 32), cross_attention_dim=128,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    parts = pipelines.load_pipeline("shapes-unet").components
    return StableDiffusionPipeline(**{**parts, "unet": unet}, requires_safety_checker=False), unet


@pytest.mark.parametrize(("method", "rate", "options"), [
    ("reconstruct", 0.5, {}), ("reconstruct", 0.5, {"pattern": "2:4", "recovery_steps": 1}), ("structured", 0.5, {}),
    ("structured", 0.3, {"recovery_steps": 1}), ("attention_heads", 0.9, {})], ids=str)
def test_weights_with_new_values_are_loaded_as_they_were_saved(tmp_path, method, rate, options):
    pipeline, unet = tiny_pipeline()
    samples = data.load_samples("shapes", 2)[0]
    calls = generation.record_calls(pipeline, samples, seed=0, batch_size=2, **{**SAMPLING, "image_size": 32})
    known = Calibration(lambda: calls, 0, guidance_scale=SAMPLING["guidance_scale"], first_batch=2)
    taken = methods.prune(method, unet, rate, calibration=known, **options).taken
    saving.save(pipeline, "unet", tmp_path / "pruned", SAMPLING, {}, {})
    loaded = pipelines.load_pipeline(str(tmp_path / "pruned")).unet
    assert unet.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(one, other) for one, other in zip(unet.parameters(), loaded.parameters()))
    if method == "reconstruct":
        assert sum(map(zeroing.count_zeros, zeroing.prunable_weights(loaded).values())) == taken


def test_numbers_that_half_precision_cannot_hold_stay_in_float32(tmp_path):
    pipeline, unet = tiny_pipeline()
    methods.prune("attention_heads", unet, 0.5, **NORM)
    saving.save(pipeline, "unet", tmp_path / "pruned", SAMPLING, {}, {})
    loaded = pipelines.load_pipeline(str(tmp_path / "pruned")).unet
    assert all(torch.equal(one, other) for one, other in zip(unet.parameters(), loaded.parameters()))
    assert saving.file_bytes(unet) == 4 * unet.num_parameters() == bytes_of_numbers(
        tmp_path / "pruned/unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("method", "rate", "options"), [
    ("reconstruct", 0.5, {}), ("reconstruct", 0.5, {"recovery_steps": 1}), ("structured", 0.5, {}),
    ("attention_heads", 0.9, {"mask_only": True}), ("iterative", 0.5, {"recovery_steps": 1})], ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_refitted_weights_are_measured_and_saved_in_the_precision_in_which_the_dense_ones_came(
        tmp_path, method, rate, options, stored):
    pipeline, unet = tiny_pipeline()
    unet.conv_out.bias.data[0] = 1e-30 if stored == torch.bfloat16 else 0  # float16 cannot hold that
    unet.to(stored).float()
    samples = data.load_samples("shapes", 2)[0]
    calls = generation.record_calls(pipeline, samples, seed=0, batch_size=2, **{**SAMPLING, "image_size": 32})
    known = Calibration(lambda: calls, 0, guidance_scale=SAMPLING["guidance_scale"], first_batch=2)
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    pruned = methods.prune(method, unet, rate, calibration=known, **options)
    if not methods.METHODS[method].removes:
        assert pruned.taken == pruned.asked == sum(int((weight == 0).sum()) for weight in unet.parameters() if
                                                   weight.dim() > 1)
    assert any(new.shape == before[name].shape and not torch.equal(new[new != 0], before[name][new != 0])
               for name, new in unet.named_parameters())
    saving.save(pipeline, "unet", tmp_path / "pruned", SAMPLING, {}, {})
    loaded = load_file(tmp_path / "pruned/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.element_size() for tensor in loaded.values()} == {2}
    assert all(torch.equal(tensor.float(), unet.state_dict()[name]) for name, tensor in loaded.items())


def test_rounding_makes_no_weight_zero_and_leaves_numbers_that_are_too_large():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1e-9, -1e-9], [0.0, 1.0001]])
    precision.round_to(layer, torch.float16)
    least = torch.finfo(torch.float16).tiny
    assert layer.weight.tolist() == [[least, -least], [0.0, 1.0]]
    layer.weight.data = torch.tensor([[1e5, 1.0001], [0.0, 0.0]])
    precision.round_to(layer, torch.float16)
    assert torch.equal(layer.weight, torch.tensor([[1e5, 1.0001], [0.0, 0.0]]))


def test_shards_are_narrowed_alike_and_load_here_and_in_diffusers_alone(tmp_path):
    pipeline, unet = tiny_pipeline()
    for name, parameter in unet.named_parameters():
        if name != "conv_in.weight":  # one number keeps all shards in float32
            parameter.data = parameter.data.half().float()
    methods.prune("structured", unet, 0.5, **NORM)
    pipeline.save_pretrained = partial(pipeline.save_pretrained, max_shard_size="100KB")
    for folder, dtypes in (("wide", {torch.float32}), ("narrow", {torch.float16})):
        saving.save(pipeline, "unet", tmp_path / folder, SAMPLING, {}, {})
        shards = {file.name: load_file(file) for file in (tmp_path / folder / "unet").glob("*.safetensors")}
        assert len(shards) > 2
        assert {tensor.dtype for shard in shards.values() for tensor in shard.values()} == dtypes
        index = json.loads((tmp_path / folder / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
        assert index["metadata"]["total_size"] == saving.file_bytes(unet) == sum(
            bytes_of_numbers(tmp_path / folder / "unet" / file) for file in shards)
        own = pipelines.load_pipeline(str(tmp_path / folder)).unet
        alone = DiffusionPipeline.from_pretrained(tmp_path / folder, trust_remote_code=True, safety_checker=None).unet
        assert type(alone).__name__ == "PrunedUNet2DConditionModel"
        for loaded in (own, alone):
            assert all(torch.equal(one, other) for one, other in zip(unet.parameters(), loaded.parameters()))
        unet.conv_in.weight.data = unet.conv_in.weight.data.half().float()


def test_a_model_whose_images_are_the_dense_ones_is_saved_with_null_for_what_is_infinite(tmp_path):
    pipeline, _ = tiny_pipeline()
    saving.save(pipeline, "unet", tmp_path / "pruned", SAMPLING, {}, {"metrics": {"psnr_dense": float("inf")}})
    assert saving.read_manifest(tmp_path / "pruned")["point"] == {"metrics": {"psnr_dense": None}}


def test_a_pruned_model_is_pruned_further_and_saved_again(tmp_path, saved):
    pipeline = pipelines.load_pipeline(str(saved))
    methods.prune("attention_heads", pipeline.unet, 0.9, **NORM)
    methods.prune("structured", pipeline.unet, 0.5, **NORM)
    saving.save(pipeline, "unet", tmp_path / "again", SAMPLING, {}, {})
    assert len(saving.read_manifest(tmp_path / "again")["removals"]) == 3
    assert np.array_equal(images(pipelines.load_pipeline(str(tmp_path / "again"))), images(pipeline))


def test_the_settings_that_a_model_is_meant_for_are_kept(saved):
    assert pipelines.sampling_settings(pipelines.load_pipeline(str(saved)), str(saved)) == SAMPLING


def change(name, value):
    return lambda manifest: manifest.update({name: value})


def change_plan(keep):
    def act(manifest):
        plan = manifest["removals"][0]
        plan[next(iter(plan))] = keep
    return act


BROKEN = {
    "out of range": (change_plan([10 ** 6]), "ascending"),
    "negative": (change_plan([-1, 3]), "ascending"),
    "repeated": (change_plan([0, 0]), "ascending"),
    "not numbers": (change_plan(["0"]), "ascending"),
    "another count": (change_plan([0, 24, 48, 72]), "do not match|norm groups|ascending"),
    "no such module": (lambda m: m["removals"][0].update({"../../etc.heads": [0]}), "has no"),
    "another class": (change("base_class", "AutoencoderKL"), "must agree"),
    "no class": (change("base_class", "os"), "must agree"),
    "a path for a component": (change("component", "../unet"), "component"),
    "another format": (change("format_version", 2), "format"),
    "no list": (change("removals", {}), "removals"),
    "no lists in the plan": (change("removals", [{"a": 3}]), "removals"),
    "another width": (lambda m: m["config"].update(block_out_channels=[48, 96, 160]),
                      "disagree about block_out_channels"),
    "a config of nothing": (lambda m: m.update(config={}), r"disagree about act_fn, .* …"),
    "no steps": (change("sampling", {}), "sampling"),
    "no scale that is a number": (change("sampling", {"steps": 2, "guidance_scale": float("nan"), "image_size": 64}),
                                  "NaN"),
    "a scale beyond all numbers": (change("sampling", {"steps": 2, "guidance_scale": 10 ** 400, "image_size": 64}),
                                   "sampling"),
    "images too large to exist": (change("sampling", {"steps": 2, "guidance_scale": 4, "image_size": 10 ** 9}),
                                  "image_size is at most"),
    "text for steps": (change("sampling", {"steps": "2", "guidance_scale": 4, "image_size": 64}), "sampling"),
}


@pytest.mark.parametrize(("act", "message"), BROKEN.values(), ids=BROKEN)
def test_a_manifest_that_cannot_be_right_is_an_error(tmp_path, saved, act, message):
    folder = tmp_path / "pruned"
    shutil.copytree(saved, folder)
    manifest = json.loads((folder / saving.MANIFEST).read_text())
    act(manifest)
    (folder / saving.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as caught:
        pipelines.load_pipeline(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1}', "[" * 100_000, "\x00\xff"])
def test_garbage_for_a_manifest_is_an_error(tmp_path, saved, text):
    folder = tmp_path / "pruned"
    shutil.copytree(saved, folder)
    (folder / saving.MANIFEST).write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=saving.MANIFEST):
        pipelines.load_pipeline(str(folder))


def test_weights_of_another_model_are_an_error(tmp_path, saved):
    folder = tmp_path / "pruned"
    shutil.copytree(saved, folder)
    shutil.copy(pipelines.MODELS["shapes-unet"].folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet")
    with pytest.raises(UserError, match="do not match"):
        pipelines.load_pipeline(str(folder))


def test_nothing_is_pickled_and_nothing_half_written(tmp_path, saved):
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".txt", ".py"}
    pipeline = pipelines.load_pipeline(str(saved))
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="exists already"):
        saving.save(pipeline, "unet", saved, SAMPLING, {}, {})
    assert before == {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        saving.save(pipeline, "unet", tmp_path / "file" / "pruned", SAMPLING, {}, {})
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_disk_that_fills_up_while_a_model_is_saved_leaves_nothing(tmp_path):
    """The system's limit on the size of files makes a write fail as a full disk does."""
    resource = pytest.importorskip("resource")
    pipeline, before = pipelines.load_pipeline("shapes-unet"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*pruned"):
            saving.save(pipeline, "unet", tmp_path / "pruned", SAMPLING, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_both_commands_save_what_they_measured(tmp_path):
    flags = ["--method", "attention_heads", "--num_images", "2", "--steps", "2", "--metrics", "lpips_dense",
             "--criterion", "norm", "--refit", "off"]
    one = [*flags, "--save_pruned", str(tmp_path / "one"), "--results_dir", str(tmp_path / "single")]
    test_single_rate.main(["--rate", "0.5", *one])
    sweep = [*flags, "--results_dir", str(tmp_path / "sweep"), "--rates", "0.5", "0.75"]
    pruning_analysis.main(sweep)  # measured first without saving, then saved without measuring
    record = tmp_path / "sweep/shapes-unet/shapes/attention_heads+criterion=norm+refit=off.json"
    before = record.read_bytes()
    pruning_analysis.main([*sweep, "--save_pruned", str(tmp_path / "many")])
    assert record.read_bytes() == before
    manifest = saving.read_manifest(tmp_path / "many/0.75")
    assert manifest["point"]["parameters"] == read_record(record).points[1].parameters
    assert manifest["pruning"]["rate"] == 0.75

    first, again = (pipelines.load_pipeline(str(folder)) for folder in (tmp_path / "one", tmp_path / "many/0.5"))
    assert np.array_equal(images(first), images(again))
    with pytest.raises(UserError, match="something else"):
        test_single_rate.main(["--rate", "0.25", *one])
    test_single_rate.main(["--rate", "0", "--model", str(tmp_path / "one"), *flags,
                           "--results_dir", str(tmp_path / "loaded")])
    loaded = read_record(tmp_path / "loaded/one/shapes/attention_heads+criterion=norm+refit=off.json")
    assert loaded.dense.parameters == saving.read_manifest(tmp_path / "one")["point"]["parameters"]
    assert loaded.settings["steps"] == 2
