"""The scenes, and the figures that the bundled model promises in its card."""
import numpy as np
import pytest

from pruning import captions, metrics, models
from pruning.shapes import scenes


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


def test_every_word_of_a_caption_is_one_token():
    tokenizer = models.load_pipeline("shapes-unet").tokenizer
    for i in range(200):
        caption = scenes.scene("train", i).caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_the_bundled_weights_are_small():
    total = sum(path.stat().st_size for path in metrics.BUNDLED.rglob("*.safetensors"))
    assert 0 < total <= 24 * 2**20


def test_the_bundled_model_draws_what_its_captions_say():
    samples, _ = captions.load_samples("shapes", 24)
    pipeline = models.load_pipeline("shapes-unet")
    settings = dict(models.default_settings(pipeline, "shapes-unet"), seed=0)
    made = models.generate(pipeline, samples, batch_size=8, **settings)
    clip = metrics.load_backbone("bundled", "clip")
    texts, cut = metrics.embed_captions(clip, [sample.caption for sample in samples])
    real = metrics.clip_score(metrics.embed_images(clip, captions.load_originals(samples, 64)), texts).mean()
    drawn = metrics.clip_score(metrics.embed_images(clip, made.pixels), texts).mean()
    assert cut == 0
    assert drawn > 0.94 * real  # 0.97 over the 512 scenes of the card; 24 scenes are noisier
