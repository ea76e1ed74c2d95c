"""The bundled scenes, and the properties of the bundled models that their cards state."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pruning import data
from pruning.metrics import backbones, scores
from pruning.models import generation, pipelines
from pruning.shapes import scenes, train


def test_no_two_splits_share_a_caption():
    seen = {split: {scenes.scene(split, i).caption for i in range(min(count, 4000))}
            for split, (count, _) in scenes.SPLITS.items()}
    assert not seen["train"] & seen["reference"]
    assert not seen["train"] & seen["prompts"]
    assert not seen["reference"] & seen["prompts"]


def test_a_scene_is_a_function_of_split_and_index():
    drawn = scenes.scene("prompts", 7)
    assert drawn == scenes.scene("prompts", 7)
    assert drawn.caption == "a yellow square above a red cross on a grey background"
    image = np.asarray(scenes.render(drawn))
    assert image.shape == (64, 64, 3)
    assert tuple(image[0, 0]) == scenes.BACKGROUNDS["grey"]
    assert tuple(image[round(drawn.objects[0].y), round(drawn.objects[0].x)]) == scenes.COLOURS["yellow"]


def test_a_scene_outside_its_split_is_an_error():
    with pytest.raises(IndexError):
        scenes.scene("prompts", 512)


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_every_word_of_a_caption_is_one_token(model):
    tokenizer = pipelines.load_pipeline(model).tokenizer
    for i in range(200):
        caption = scenes.scene("train", i).caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2 <= tokenizer.model_max_length


def test_an_existing_tokenizer_is_not_learned_again(tmp_path):
    source = train.HERE / "clip"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, tmp_path)
    before = (tmp_path / "vocab.json").read_bytes()
    tokenizer = train.make_tokenizer(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == before
    caption = "a red cross above a small blue ring"
    assert tokenizer(caption).input_ids == pipelines.load_pipeline("shapes-unet").tokenizer(caption).input_ids


def test_padded_joint_attention_gives_the_output_of_all_zero_tokens():
    torch.manual_seed(0)
    mmdit = train.make_mmdit().eval()
    for parameter in mmdit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = torch.randn(2, 16, 256)
    call = dict(hidden_states=torch.randn(2, 4, 16, 16), timestep=torch.tensor([10.0, 900.0]),
                pooled_projections=torch.randn(2, 128))
    with torch.no_grad():
        whole = mmdit(**call, encoder_hidden_states=F.pad(text, (0, 0, 0, train.T5_TOKENS))).sample
        mmdit.set_attn_processor(train.PaddedJointAttention())
        short = mmdit(**call, encoder_hidden_states=F.pad(text, (0, 0, 0, 1))).sample
    assert torch.allclose(whole, short, atol=1e-4)


def test_the_bundled_weights_are_small():
    sizes = {path: path.stat().st_size for path in train.HERE.rglob("*.safetensors")}
    mmdit = sum(size for path, size in sizes.items() if "shapes-mmdit" in path.parts)
    assert 0 < mmdit <= 16 * 2**20
    assert 0 < sum(sizes.values()) - mmdit <= 24 * 2**20


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_the_images_of_a_bundled_model_match_their_captions(model):
    samples, _ = data.load_samples("shapes", 24)
    pipeline = pipelines.load_pipeline(model)
    settings = dict(pipelines.sampling_settings(pipeline, model), seed=0)
    generated = generation.generate(pipeline, samples, batch_size=8, **settings)
    clip = backbones.load_backbone("bundled", "clip")
    texts, truncated = backbones.embed_captions(clip, [sample.caption for sample in samples])
    real = scores.clip_score(backbones.embed_images(clip, data.load_originals(samples, 64)), texts).mean()
    dense = scores.clip_score(backbones.embed_images(clip, generated.pixels), texts).mean()
    assert truncated == []
    assert dense > 0.94 * real  # the cards give 0.99 for 500 scenes; 24 scenes are noisier
