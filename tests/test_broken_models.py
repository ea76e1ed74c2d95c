"""A model that is not whole, or that makes no images of captions, is one clear line; a whole one is never refused."""
from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import socket
import threading
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from pruning import UserError, data, offline_by, pruning_analysis
from pruning.data.faults import sentences
from pruning.metrics import backbones
from pruning.models import generation, pipelines, saving, weights_files
from pruning.records.record import read_record

UNET, VAE, TEXT, MMDIT = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                          "text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
SETTINGS = {"seed": 0, "steps": 2, "guidance_scale": 4.0, "image_size": 64, "batch_size": 2}


def copy_of(model, folder):
    return shutil.copytree(pipelines.MODELS[model].folder, folder / "model")


def change_tensors(path, change):
    tensors = load_file(str(path))
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, str(path), {"format": "pt"})


def lose(path, *names):
    return lambda folder: change_tensors(folder / path, lambda tensors: [tensors.pop(name) for name in names])


def write(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def remove(path):
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def cut(path):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:2000])


def dangle(path):
    def act(folder):
        (folder / path).unlink()
        (folder / path).symlink_to(folder / "nowhere")
    return act


def pipeline_class(name):
    def act(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return act


BROKEN = {
    "a text encoder without a tensor": ("shapes-unet", lose(TEXT, "text_model.encoder.layers.1.mlp.fc1.weight"),
                                        r"text_encoder lack 1 tensor of CLIPTextModel: .*layers.1.mlp.fc1.weight"),
    "a UNet without tensors": ("shapes-unet", lose(UNET, "conv_in.weight", "conv_out.bias", "conv_in.bias",
                                                   "conv_out.weight"),
                               "unet lack 4 tensors of UNet2DConditionModel: conv_in.bias, conv_in.weight, conv_out"),
    "a VAE without a tensor": ("shapes-unet", lose(VAE, "decoder.conv_out.bias"), "vae lack 1 .*decoder.conv_out.bias"),
    "a transformer without a tensor": ("shapes-mmdit", lose(MMDIT, "proj_out.weight"), "transformer lack .*proj_out.w"),
    "a projection that is lost": ("shapes-mmdit", lose("text_encoder_2/model.safetensors", "text_projection.weight"),
                                  "text_encoder_2 lack 1 tensor .*text_projection.weight"),
    "weights cut short": ("shapes-unet", cut(UNET), "diffusion_pytorch_model.safetensors is no whole safetensors file"),
    "a text encoder cut short": ("shapes-unet", cut(TEXT), "model.safetensors is no whole safetensors file"),
    "empty weights": ("shapes-unet", write(VAE, b""), "is no whole safetensors file"),
    "a dangling link": ("shapes-unet", dangle(UNET), "diffusion_pytorch_model.safetensors is missing"),
    "no weights": ("shapes-unet", remove(UNET), "no file named diffusion_pytorch_model.safetensors"),
    "no tokenizer": ("shapes-unet", remove("tokenizer"), "has no files in tokenizer/"),
    "no scheduler": ("shapes-unet", remove("scheduler"), "has no files in scheduler/"),
    "garbage for a tokenizer": ("shapes-unet", lambda folder: [file.write_text("{") for file in (
        folder / "tokenizer").iterdir()], "cannot load model"),
    "a config of something else": ("shapes-unet", write("text_encoder/config.json", b"{}"), "cannot load model"),
    "no JSON": ("shapes-unet", write("model_index.json", b"\xff{"), "model_index.json"),
    "a list for an object": ("shapes-unet", write("model_index.json", b"[]"), "pipeline class"),
    "no pipeline class": ("shapes-unet", pipeline_class("logging"), "no pipeline class logging"),
    "no captions": ("shapes-unet", pipeline_class("DDPMPipeline"), "DDPMPipeline is no text-to-image pipeline.*prompt"),
    "images to start from": ("shapes-unet", pipeline_class("StableDiffusionImg2ImgPipeline"), "does not take height"),
    "images to follow": ("shapes-unet", pipeline_class("StableDiffusionControlNetPipeline"), "controlnet"),
    "images to mend": ("shapes-unet", pipeline_class("StableDiffusionInpaintPipeline"), "takes image, mask_image too"),
    "films": ("shapes-unet", pipeline_class("TextToVideoSDPipeline"), "takes num_frames too"),
}


@pytest.mark.parametrize(("model", "act", "words"), BROKEN.values(), ids=BROKEN)
def test_a_model_that_is_not_whole_is_refused_in_one_line_that_names_what_is_wrong(tmp_path, capfd, model, act, words):
    folder = copy_of(model, tmp_path)
    act(folder)
    sample = data.load_samples("shapes", 1)[0][0]
    capfd.readouterr()
    with pytest.raises(UserError, match=words):
        generation.check_makes_images(pipelines.load_pipeline(str(folder)), sample, **SETTINGS)
    assert capfd.readouterr().err == ""  # the command prints the error, and the libraries nothing


def test_tensors_that_nothing_uses_are_named_and_the_model_runs(tmp_path, capsys):
    folder = copy_of("shapes-unet", tmp_path)
    change_tensors(folder / TEXT, lambda tensors: tensors.update(
        {"text_model.embeddings.position_ids": torch.arange(16), "logit_scale": torch.zeros(1)}))
    pipelines.load_pipeline(str(folder))
    said = "Tensors in weights files that the classes of their components do not use: 1 (text_encoder: logit_scale).\n"
    assert capsys.readouterr().err == said
    pruning_analysis.main(["--model", str(folder), "--num_images", "1", "--steps", "1", "--rates", "0.5", "--metrics",
                           "generation_time", "--results_dir", str(tmp_path / "results")])
    assert said in capsys.readouterr().err
    path = tmp_path / "results/model/shapes/magnitude.json"
    assert sentences(read_record(path).notes.faults)[-1] == said.strip()
    assert "logit_scale" in path.with_suffix(".txt").read_text(encoding="utf-8")


def test_a_gpu_that_is_too_small_for_the_denoiser_is_one_line_with_the_remedy():
    class Large(torch.nn.Linear):
        def to(self, device):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    message = r"cuda has no memory for the denoiser .*--offload model or --dtype bfloat16 \(CUDA .* 20.00 GiB\)$"
    with pytest.raises(UserError, match=message):
        pipelines.set_denoiser(pipelines.load_pipeline("shapes-unet"), Large(1, 1), "cuda")


@pytest.fixture
def loads(monkeypatch):
    """The classes of the components that are loaded a second time."""
    found, compare = [], weights_files.differing_names

    def watching(module, held):
        missing, extra = compare(module, held)
        found.extend([type(module).__name__] * bool(missing))
        return missing, extra
    monkeypatch.setattr(weights_files, "differing_names", watching)
    return found


@pytest.mark.parametrize("model", pipelines.MODELS)
def test_a_whole_model_is_loaded_once_from_one_file_or_from_shards(tmp_path, model, loads, capsys):
    pipelines.load_pipeline(model).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert list((tmp_path / "shards").glob("*/*.index.json"))
    sharded = pipelines.load_pipeline(str(tmp_path / "shards"))
    assert loads == []
    assert capsys.readouterr().err == ""
    index = next((tmp_path / "shards").glob("vae/*.index.json"))
    shards = json.loads(index.read_text())
    name, file = next(iter(shards["weight_map"].items()))
    change_tensors(index.parent / file, lambda tensors: [tensors.pop(name)])
    with pytest.raises(UserError, match=re.escape(name)):
        pipelines.load_pipeline(str(tmp_path / "shards"))
    (index.parent / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        pipelines.load_pipeline(str(tmp_path / "shards"))
    index.write_text("[]")
    with pytest.raises(UserError, match="is not an index"):
        pipelines.load_pipeline(str(tmp_path / "shards"))
    assert sharded is not None


def test_a_model_with_the_names_of_early_releases_is_whole(tmp_path, loads):
    folder, old = copy_of("shapes-unet", tmp_path), {"to_q": "query", "to_k": "key", "to_v": "value",
                                                     "to_out.0": "proj_attn"}

    def rename(tensors):
        return {re.sub("|".join(old), lambda found: old[found[0]], name): tensor for name, tensor in tensors.items()}
    change_tensors(folder / VAE, rename)
    made = pipelines.load_pipeline(str(folder)).vae.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in pipelines.load_pipeline(
        "shapes-unet").vae.state_dict().items())
    assert loads == []


# ---- pipelines of other kinds

class Films(StableDiffusionPipeline):
    """A pipeline that gives frames."""

    def __call__(self, **kwargs):
        return type("FilmOutput", (), {"frames": super().__call__(**kwargs).images})()


class Plain(StableDiffusionPipeline):
    """A pipeline that encodes its prompts in its call and takes two steps or more."""

    vae_scale_factor = None

    def __getattribute__(self, name):
        if name == "encode_prompt" and not super().__getattribute__("__dict__").get("calling"):
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __call__(self, num_inference_steps=2, **kwargs):
        if num_inference_steps < 2:
            raise ValueError("two steps or more")
        self.__dict__["calling"] = True
        try:
            self.vae_scale_factor = 4
            return super().__call__(num_inference_steps=num_inference_steps, **kwargs)
        finally:
            self.__dict__["calling"] = False


def test_a_pipeline_that_makes_no_images_is_one_line():
    pipeline = pipelines.load_pipeline("shapes-unet")
    pipeline.__class__ = Films
    with pytest.raises(UserError, match="gives FilmOutput, which holds no RGB images"):
        generation.check_makes_images(pipeline, data.load_samples("shapes", 1)[0][0], **SETTINGS)


def test_a_denoiser_that_gives_what_its_pipeline_cannot_take_is_one_line():
    pipeline = pipelines.load_pipeline("shapes-unet")
    forward = pipeline.unet.forward
    pipeline.unet.forward = functools.wraps(forward)(lambda *args, **kwargs: [list(forward(*args, **kwargs)[0])])
    with pytest.raises(UserError, match="StableDiffusionPipeline cannot make an image of 64 pixels a side"):
        generation.check_makes_images(pipeline, data.load_samples("shapes", 1)[0][0], **SETTINGS)


def test_a_pipeline_that_says_little_of_itself_and_takes_no_single_step_is_measured():
    pipeline, samples = pipelines.load_pipeline("shapes-unet"), data.load_samples("shapes", 2)[0]
    pipeline.__class__ = Plain
    pipeline.vae_scale_factor = None
    with pytest.raises(UserError, match="does not say what size its images have; give --image_size"):
        pipelines.sampling_settings(pipeline, "plain")
    generation.remember_prompts(pipeline)
    generation.check_makes_images(pipeline, samples[0], **SETTINGS)
    generation.one_step(pipeline, samples, **SETTINGS)
    assert set(generation.first_call(pipeline, samples, **SETTINGS)) >= {"sample", "timestep", "encoder_hidden_states"}


def test_one_call_of_the_denoiser_stands_for_all_and_leaves_it_as_it_was():
    pipeline, samples = pipelines.load_pipeline("shapes-unet"), data.load_samples("shapes", 2)[0]
    calls = []
    pipeline.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    recorded = generation.record_calls(pipeline, samples, **SETTINGS)[0][0]
    before = len(calls)
    first = generation.first_call(pipeline, samples, **{**SETTINGS, "steps": 2})
    assert len(calls) == before + 1
    assert first.keys() == recorded.keys()
    assert all(torch.equal(first[name], recorded[name]) for name in ("sample", "timestep", "encoder_hidden_states"))
    assert "forward" not in vars(pipeline.unet)


# ---- the hub

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that refuses each model in the way that the model's name says."""

    codes = {"gated": "GatedRepo", "entry": "EntryNotFound", "repo": "RepoNotFound"}

    def answer(self):
        kind, status = re.search(r"/someone/([a-z]+)(\d*)", self.path).groups()
        self.send_response(int(status or 200))
        for name, value in {"X-Error-Code": self.codes.get(kind, ""), "X-Repo-Commit": "0" * 40, "ETag": '"0"',
                            "Content-Length": "0" if status else "1000"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass


REFUSALS = {
    "gated401": "accept the licence on http://.*someone/gated401 and log in with `hf auth login`",
    "gated403": "your account may not read it: accept the licence on", "repo404": "the hub has no such model",
    "entry404": "it has no model_index.json", "plain404": "the hub has no such model", "plain429": "wait some minutes",
    "plain500": "error 500", "plain503": "error 503: give the same command again later",
    "cut": "the connection was cut: give the same command again"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    forget = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions
    forget()
    yield
    forget()
    server.shutdown()
    server.server_close()


def test_each_way_in_which_a_hub_refuses_is_one_line_with_its_remedy(hub, monkeypatch, capfd):
    for name, words in REFUSALS.items():
        with pytest.raises(UserError, match=words):
            pipelines.load_pipeline(f"someone/{name}")

    def refuse(*_):
        raise ConnectionRefusedError(111, "Connection refused")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="cannot be reached. Without a network, .*hf download someone/gone --local-dir"):
        pipelines.load_pipeline("someone/gone")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_a_variable_that_forbids_the_network_stops_every_download(name, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert offline_by() == ""
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    for family in ("features", "lpips"):
        with pytest.raises(UserError, match=f"{name}=1 forbids the network"):
            backbones.load_backbone("standard", family)
    with pytest.raises(UserError, match=f"{name}=1 forbids the network"):
        data.load_samples("coco", 2)


# ---- saved pruned models

def test_a_disk_without_room_for_a_saved_model_is_said_before_the_work(tmp_path):
    with pytest.raises(UserError, match="takes at least 1,000,000.0 GB, and .* GB of the disk are free"):
        saving.check_room(tmp_path / "pruned", 10 ** 15)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "pruned", tmp_path / ("n" * 252)):
        with pytest.raises(UserError, match="cannot write"):
            saving.check_room(folder, 0)
    saving.check_room(tmp_path / "new" / "pruned", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
    assert list((tmp_path / "new").iterdir()) == []
