"""What decides a pixel decides the provenance: a record never goes on with another model or other data."""
from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from pruning import UserError, pruning_analysis
from pruning.models import pipelines, provenance
from pruning.records.record import read_record

FLAGS = ["--num_images", "2", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--metrics", "clip_score"]


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(pipelines.MODELS["shapes-unet"].folder, tmp_path / "model")


def change(path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **values}))


def add_a_word(folder):
    path = next(path for path in (folder / "tokenizer").iterdir() if path.name in ("tokenizer.json", "vocab.json"))
    text = json.loads(path.read_text())
    vocab = text["model"]["vocab"] if path.name == "tokenizer.json" else text
    first, second, *_ = vocab
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(text))


CHANGES = {
    "the noise that the scheduler predicts": lambda folder: change(
        folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction"),
    "the scheduler's class": lambda folder: (
        change(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler"),
        change(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])),
    "the scale of latents": lambda folder: change(folder / "vae" / "config.json", scaling_factor=0.5),
    "how the denoiser reads the time": lambda folder: change(folder / "unet" / "config.json", freq_shift=1),
    "the tokens of words": add_a_word,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_model_beside_its_weights_changes_the_provenance(copy, what):
    before = provenance.fingerprint_configs(pipelines.load_pipeline(str(copy)))
    CHANGES[what](copy)
    assert provenance.fingerprint_configs(pipelines.load_pipeline(str(copy))) != before


def test_a_copy_elsewhere_is_the_same_model(copy):
    texts = {provenance.fingerprint_configs(pipelines.load_pipeline(model)) for model in ("shapes-unet", str(copy))}
    assert len(texts) == 1


def test_a_record_does_not_go_on_with_another_scheduler(copy, tmp_path):
    flags = [*FLAGS, "--model", str(copy), "--results_dir", str(tmp_path / "results")]
    pruning_analysis.main([*flags, "--rates", "0.3"])
    CHANGES["the noise that the scheduler predicts"](copy)
    with pytest.raises(UserError, match="configs: "):
        pruning_analysis.main([*flags, "--rates", "0.5"])
    path, = (tmp_path / "results").rglob("magnitude.json")
    assert [point.rate for point in read_record(path).points] == [0.3]


def test_a_record_does_not_go_on_with_another_image_under_the_same_name(tmp_path):
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 100, 50)).save(folder / "Images" / f"{number}.jpg")
    rows = "".join(f"{number}.jpg,a circle of colour {number}\n" for number in range(8))
    (folder / "captions.txt").write_text(f"image,caption\n{rows}")
    flags = [*FLAGS, "--model", "shapes-unet", "--dataset", "flickr8k", "--data_dir", str(folder),
             "--metric_backbones", "bundled", "--results_dir", str(tmp_path / "results")]
    pruning_analysis.main([*flags, "--rates", "0.3"])
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 100, 200)).save(folder / "Images" / f"{number}.jpg")
    with pytest.raises(UserError, match="originals: "):
        pruning_analysis.main([*flags, "--rates", "0.5"])
