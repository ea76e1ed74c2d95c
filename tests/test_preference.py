"""pick_score and image_reward, which predict what people prefer, on small networks in the place of the published."""
from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from test_analysis import fails
from torch.nn import functional as F

from pruning import UserError, prefetch, pruning_analysis
from pruning.metrics import BACKBONES, DEFAULT, backbones, image_reward, scores
from pruning.records import report, store
from pruning.records.record import read_record
from pruning.records.summaries import summary

SCALE = 37.0
FLAGS = ["--num_images", "5", "--steps", "1", "--rates", "0.5", "--device", "cpu", "--metrics", "pick_score"]


def use_cache(monkeypatch, folder):
    """Let this folder be the hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(folder), raising=False)


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
    use_cache(monkeypatch, tmp_path / "hub")
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
    assert not {"pick_score", "image_reward"} & set(DEFAULT)
    asked = []
    monkeypatch.setattr(prefetch.backbones, "backbone_files", lambda kind, family: asked.append(family) or [])
    for flags in ([], ["--metrics", "pick_score"], ["--metrics", "image_reward"]):
        prefetch.main(["--metric_backbones", "standard", *flags])
    assert asked == ["clip", "features", "lpips", "preference", "reward"]


@pytest.mark.parametrize("metric", ["pick_score", "image_reward"])
def test_the_bundled_networks_do_not_have_it(capsys, tmp_path, metric):
    line = fails(capsys, pruning_analysis.main, *FLAGS[:-1], metric, "--results_dir", tmp_path)
    assert line == (f"error: the bundled metric backbones have no network for {metric}: give --metric_backbones "
                    "standard, or leave it out of --metrics")
    assert "no network" in fails(capsys, prefetch.main, "--metrics", metric)


def test_without_a_network_the_error_names_both_repositories(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path)
    both = f"hf download {backbones.PICK_ID} .*hf download {backbones.PICK_PROCESSOR_ID} .*copy the folders models--yuv"
    with pytest.raises(UserError, match=both):
        backbones.load_backbone("standard", "preference")
    both = "hf download THUDM/ImageReward ImageReward.pt .*hf download google-bert/bert-base-uncased vocab.txt .*models"
    with pytest.raises(UserError, match=both):
        backbones.load_backbone("standard", "reward")


# ---------------------------------------------------------------- image_reward

WIDTH, HEADS, SIDE, PATCH = 32, 2, 32, 16  # of the image encoder
TEXT = {"architectures": ["BertModel"], "model_type": "bert", "type_vocab_size": 2, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "add_cross_attention": True, "encoder_width": 768, "hidden_act": "gelu",
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 2,
        "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "pad_token_id": 0}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "a", "and", "circle", "square", "red", "blue", "large",
         "small", "left", "right", "of", "the", "on", "above", "below", "black", "white", "green", "yellow", "triangle"]


def published_tensors():
    """Return random tensors with the names of ImageReward.pt, of a small network."""
    torch.manual_seed(0)
    tensors, text = {}, TEXT["hidden_size"]

    def linear(name, inputs, outputs):
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs ** 0.5
        tensors[f"{name}.bias"] = 0.3 * torch.randn(outputs)

    def norm(name, size):
        tensors.update({f"{name}.weight": 1 + 0.3 * torch.randn(size), f"{name}.bias": 0.3 * torch.randn(size)})

    eye = "blip.visual_encoder"  # its first activations are small, so that the epsilon of its norms counts
    tensors[f"{eye}.cls_token"] = 0.03 * torch.randn(1, 1, WIDTH)
    tensors[f"{eye}.pos_embed"] = 0.03 * torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    tensors[f"{eye}.patch_embed.proj.weight"] = 1e-3 * torch.randn(WIDTH, 3, PATCH, PATCH)
    tensors[f"{eye}.patch_embed.proj.bias"] = 0.03 * torch.randn(WIDTH)
    for block in (f"{eye}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
        linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
    norm(f"{eye}.norm", WIDTH)
    words = "blip.text_encoder.embeddings"
    tensors[f"{words}.position_ids"] = torch.arange(TEXT["max_position_embeddings"])[None]
    tensors[f"{words}.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, text)
    tensors[f"{words}.position_embeddings.weight"] = torch.randn(TEXT["max_position_embeddings"], text)
    norm(f"{words}.LayerNorm", text)
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(TEXT["num_hidden_layers"])):
        for attention, inputs in (("attention", text), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", text, text)
            linear(f"{layer}.{attention}.self.key", inputs, text)
            linear(f"{layer}.{attention}.self.value", inputs, text)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, TEXT["intermediate_size"])
        linear(f"{layer}.output.dense", TEXT["intermediate_size"], text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", WIDTH, 8)
    linear("blip.text_proj", text, 8)
    for name, inputs, outputs in zip((0, 2, 4, 6, 7), (text, 1024, 128, 64, 16), (1024, 128, 64, 16, 1)):
        linear(f"mlp.layers.{name}", inputs, outputs)
    return tensors


def published_scores(tensors, pixels, ids):
    """Return what the published model makes of pixels (n, 3, SIDE, SIDE) and tokens (n, 35), in plain torch."""
    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def attend(queries, keys, values, heads, hidden=0.0):
        queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
        alike = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5 + hidden
        return (alike.softmax(-1) @ values).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder"
    patches = F.conv2d(pixels, tensors[f"{eye}.patch_embed.proj.weight"], tensors[f"{eye}.patch_embed.proj.bias"],
                       stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([tensors[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + tensors[f"{eye}.pos_embed"]
    for block in (f"{eye}.blocks.{i}" for i in range(2)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, HEADS))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)

    words, eps, heads = "blip.text_encoder.embeddings", TEXT["layer_norm_eps"], TEXT["num_attention_heads"]
    x = tensors[f"{words}.word_embeddings.weight"][ids]
    x = norm(f"{words}.LayerNorm", x + tensors[f"{words}.position_embeddings.weight"][:ids.shape[1]], eps)
    padding = torch.where(ids == 0, -10000.0, 0.0)[:, None, None]
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(TEXT["num_hidden_layers"])):
        for attention, hidden in (("attention", padding), ("crossattention", 0.0)):
            own, others = f"{layer}.{attention}", x if attention == "attention" else seen
            found = attend(linear(f"{own}.self.query", x), linear(f"{own}.self.key", others),
                           linear(f"{own}.self.value", others), heads, hidden)
            x = norm(f"{own}.output.LayerNorm", linear(f"{own}.output.dense", found) + x, eps)
        inner = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", inner + x, eps)
    x = x[:, 0]
    for name in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{name}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def published_inputs(images, captions, limit=35):
    """Return the pixels and tokens that the published model is given for images of any size and captions of WORDS."""
    resized = np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BICUBIC)) for image in images])
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.from_numpy((resized / 255 - mean) / deviation).float().permute(0, 3, 1, 2)
    ids = torch.zeros(len(captions), limit, dtype=torch.long)
    for row, caption in zip(ids, captions):
        words = re.findall(r"[a-z]+|[^a-z ]", caption.lower())[:limit - 2]
        row[:len(words) + 2] = torch.tensor([2, *(WORDS.index(word) if word in WORDS else 1 for word in words), 3])
    return pixels, ids


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """ImageReward as the hub's cache holds it, small and random; beside it BERT's tokenizer. Yields tensors, folder."""
    use_cache(monkeypatch, tmp_path / "hub")
    monkeypatch.setattr(image_reward, "VISION", dict(
        image_reward.VISION, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=HEADS, image_size=SIDE, patch_size=PATCH))
    folder, tensors = snapshot(tmp_path / "hub", backbones.REWARD_ID), published_tensors()
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**TEXT, "vocab_size": len(WORDS) + 2}))
    (snapshot(tmp_path / "hub", backbones.BERT_ID) / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tensors, folder


def test_image_reward_is_what_the_published_model_computes(reward):
    network = backbones.load_backbone("standard", "reward")
    images = np.random.default_rng(0).integers(0, 256, (4, 50, 50, 3), dtype=np.uint8)
    captions = ["a large red circle", "A  Blue square, left of it", "", "the small circle " * 20]
    expected = published_scores(reward[0], *published_inputs(images, captions))
    assert expected.std() > 0.1
    assert scores.image_reward(network, images, captions, batch_size=3) == pytest.approx(expected.tolist(), abs=1e-5)
    assert network.truncated(captions) == [3]
    with pytest.raises(ValueError, match="unpaired: 4 images and 3 captions"):
        scores.image_reward(network, images, captions[:3])


@pytest.mark.parametrize(("change", "said"), [
    (lambda tensors: tensors.pop("blip.visual_encoder.norm.bias"), "vision.post_layernorm.bias is missing"),
    (lambda tensors: tensors.update({"blip.itm_head.bias": torch.zeros(2)}), "blip.itm_head.bias is unknown"),
    (lambda tensors: tensors.update({"mlp.layers.7.bias": torch.zeros(2)}), "head.7.bias is (2,) instead of (1,)"),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if "blocks.1.mlp" in name], ", and 1 more"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(reward, change, said):
    tensors, folder = reward
    change(tensors)
    torch.save(tensors, folder / "ImageReward.pt")
    with pytest.raises(UserError) as error:
        backbones.load_backbone("standard", "reward")
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("cannot load ImageReward: tensors do not fit: ")
    assert f"{said} -- on a machine with a network, run 'hf download THUDM/ImageReward ImageReward.pt" in line


def test_prefetch_names_the_files_of_image_reward_and_of_its_tokenizer(reward, capsys):
    names = [path.name for path in backbones.backbone_files("standard", "reward")]
    assert sorted(names) == ["ImageReward.pt", "med_config.json", "vocab.txt"]
    prefetch.main(["--metric_backbones", "standard", "--metrics", "image_reward"])
    assert "metric network standard THUDM/ImageReward: 3 files, " in capsys.readouterr().out


# ---------------------------------------------------------------- both

def test_a_run_records_both_for_each_image_and_says_which_captions_were_cut(pick, reward, tmp_path, monkeypatch):
    for function in ("write_record_files", "write_report"):  # other tests draw
        monkeypatch.setattr(report, function, lambda *_, **__: [])
    monkeypatch.setattr(image_reward, "LIMIT", 14)
    (model, tokenizer), (tensors, _) = pick, reward
    pruning_analysis.main([*FLAGS, "image_reward", "--metric_backbones", "standard",
                           "--results_dir", str(tmp_path / "r")])
    record = read_record(tmp_path / "r/shapes-unet/shapes/magnitude.json")
    assert record.backbones["pick_score"].startswith(BACKBONES["standard"]["preference"])
    assert record.backbones["image_reward"].startswith(BACKBONES["standard"]["reward"])
    captions = [sample["caption"] for sample in record.samples]
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    for point in (record.dense, *record.points):
        files = [store.image_file(tmp_path / "r/shapes-unet/shapes/images", "magnitude", point.rate, i)
                 for i in range(len(captions))]
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        images = backbones.load_backbone("standard", "preference").processor(list(pixels), return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens, pixel_values=images.pixel_values).logits_per_image.diagonal()
        assert point.per_image["pick_score"] == pytest.approx(expected.tolist(), abs=1e-3)
        expected = published_scores(tensors, *published_inputs(pixels, captions, limit=14))
        assert point.per_image["image_reward"] == pytest.approx(expected.tolist(), abs=1e-5)
    low, high = record.points[0].intervals["image_reward"]
    assert low < record.points[0].metrics["image_reward"] - record.dense.metrics["image_reward"] < high
    cut = [sample["id"] for sample in record.samples if len(sample["caption"].split()) > 12]
    assert 0 < len(cut) < len(captions)
    text = " ".join(summary(record).split())
    assert f"Captions cut where ImageReward stops reading: {len(cut)} ({cut[0]};" in text
    assert "image_reward ↑ higher is better: how highly people would rank each image" in text
