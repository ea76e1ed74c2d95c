"""pick_score, which predicts what people prefer, on a small CLIP in the place of PickScore's."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from test_analysis import fails

from pruning import UserError, prefetch, pruning_analysis
from pruning.metrics import BACKBONES, DEFAULT, backbones, scores
from pruning.records import report, store
from pruning.records.record import read_record

SCALE = 37.0
FLAGS = ["--num_images", "2", "--steps", "1", "--rates", "0.5", "--device", "cpu", "--metrics", "pick_score"]


def snapshot(cache, name):
    """Make a folder of the hub's cache for a repository, and return the folder of its files."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


@pytest.fixture
def pick(tmp_path, monkeypatch):
    """PickScore as the hub's cache holds it, small and random: the model, and apart from it tokenizer and processor."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    clip = backbones.BUNDLED / "clip"
    torch.manual_seed(0)
    config = json.loads((clip / "config.json").read_text())
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    model.logit_scale.data.fill_(np.log(SCALE))
    model.save_pretrained(snapshot(tmp_path / "hub", backbones.PICK_ID), safe_serialization=True)
    beside = snapshot(tmp_path / "hub", backbones.PICK_PROCESSOR_ID)
    for path in clip.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, beside)
    (beside / "config.json").write_text(json.dumps(config))
    return model, transformers.CLIPTokenizer.from_pretrained(str(clip))


def test_pick_score_is_what_the_model_gives_for_image_and_caption(pick, tmp_path, monkeypatch):
    model, tokenizer = pick
    for function in ("write_record_files", "write_report"):  # other tests draw
        monkeypatch.setattr(report, function, lambda *_, **__: [])
    pruning_analysis.main([*FLAGS, "--metric_backbones", "standard", "--results_dir", str(tmp_path / "r")])
    record = read_record(tmp_path / "r/shapes-unet/shapes/magnitude.json")
    assert record.backbones["pick_score"].startswith(BACKBONES["standard"]["preference"])
    tokens = tokenizer([sample["caption"] for sample in record.samples], padding=True, return_tensors="pt")
    for point in (record.dense, *record.points):
        files = [store.image_file(tmp_path / "r/shapes-unet/shapes/images", "magnitude", point.rate, i) for i in (0, 1)]
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        images = backbones.load_backbone("standard", "preference").processor(list(pixels), return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens, pixel_values=images.pixel_values).logits_per_image.diagonal()
        assert point.per_image["pick_score"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_scale_is_the_models_own(pick):
    network = backbones.load_backbone("standard", "preference")
    assert network.scale == pytest.approx(SCALE)
    rows = np.eye(2, 3)
    assert scores.pick_score(rows, rows[::-1], network.scale).tolist() == [0, 0]
    assert scores.pick_score(rows, rows, network.scale) == pytest.approx([SCALE, SCALE])
    with pytest.raises(ValueError, match="unpaired"):
        scores.pick_score(rows, rows[:1], SCALE)


def test_the_files_that_are_fetched_are_those_of_model_and_processor(pick):
    names = {path.name for path in backbones.backbone_files("standard", "preference")}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt"} <= names


def test_only_a_run_that_names_it_fetches_and_measures_it(pick, monkeypatch, capsys):
    assert "pick_score" not in DEFAULT
    asked = []
    monkeypatch.setattr(prefetch.backbones, "backbone_files", lambda kind, family: asked.append(family) or [])
    for flags in ([], ["--metrics", "pick_score"]):
        prefetch.main(["--metric_backbones", "standard", *flags])
    assert asked == ["clip", "features", "lpips", "preference"]


def test_the_bundled_networks_do_not_have_it(capsys, tmp_path):
    line = fails(capsys, pruning_analysis.main, *FLAGS, "--results_dir", tmp_path)
    assert line == ("error: the bundled metric backbones have no network for pick_score: give --metric_backbones "
                    "standard, or leave it out of --metrics")
    assert "no network" in fails(capsys, prefetch.main, "--metrics", "pick_score")


def test_without_a_network_the_error_names_both_repositories(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    both = f"hf download {backbones.PICK_ID} .*hf download {backbones.PICK_PROCESSOR_ID} .*copy the folders models--yuv"
    with pytest.raises(UserError, match=both):
        backbones.load_backbone("standard", "preference")
