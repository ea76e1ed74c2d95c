"""The scenes, and the figures that the bundled model promises in its card."""
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pruning import data, metrics
from pruning.models import pipelines
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


def test_a_tokenizer_that_is_there_is_not_learned_again(tmp_path):
    source = metrics.BUNDLED / "clip"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, tmp_path)
    before = (tmp_path / "vocab.json").read_bytes()
    tokenizer = train.make_tokenizer(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == before
    caption = "a red cross above a small blue ring"
    assert tokenizer(caption).input_ids == pipelines.load_pipeline("shapes-unet").tokenizer(caption).input_ids


def test_one_token_with_the_weight_of_many_does_what_the_pipelines_zeros_do():
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
    sizes = {path: path.stat().st_size for path in metrics.BUNDLED.rglob("*.safetensors")}
    mmdit = sum(size for path, size in sizes.items() if "shapes-mmdit" in path.parts)
    assert 0 < mmdit <= 16 * 2**20
    assert 0 < sum(sizes.values()) - mmdit <= 24 * 2**20


@pytest.mark.parametrize("model", list(pipelines.MODELS))
def test_the_bundled_model_draws_what_its_captions_say(model):
    samples, _ = data.load_samples("shapes", 24)
    pipeline = pipelines.load_pipeline(model)
    settings = dict(pipelines.sampling_settings(pipeline, model), seed=0)
    made = pipelines.generate(pipeline, samples, batch_size=8, **settings)
    clip = metrics.load_backbone("bundled", "clip")
    texts, cut = metrics.embed_captions(clip, [sample.caption for sample in samples])
    real = metrics.clip_score(metrics.embed_images(clip, data.load_originals(samples, 64)), texts).mean()
    drawn = metrics.clip_score(metrics.embed_images(clip, made.pixels), texts).mean()
    assert cut == 0
    assert drawn > 0.94 * real  # 0.97 over the 512 scenes of the card; 24 scenes are noisier
