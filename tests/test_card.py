"""The model card of a saved pipeline: what the hub reads, what was measured, how to load, and a strip of images."""
from __future__ import annotations

import ast
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from test_plots import make_record

from pruning.models import signature
from pruning.records import card, store
from pruning.records.answers import share_of_dense

CALL = "'a red circle', num_inference_steps=20"


class Guided:
    """A pipeline class as far as its call says."""

    def __call__(self, prompt, num_inference_steps=50, guidance_scale=1.0, true_cfg_scale=4.0):
        """Draw nothing."""


@pytest.fixture
def record():
    return make_record("structured", rates=(0.1, 0.2))


def keep_images(record, folder, count):
    for level, rate in ((200, 0.0), (50, 0.2)):
        for k in range(count):
            path = store.image_file(folder, record.variant, rate, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(path)


def test_the_hub_reads_base_model_and_method(record, tmp_path):
    known = replace(record, model="org/model")
    found = ModelCard(card.text(known, tmp_path, False, CALL)).data
    assert (found.base_model, found.library_name, found.pipeline_tag) == ("org/model", "diffusers", "text-to-image")
    assert "structured" in found.tags
    # A folder is no model of the hub.
    assert ModelCard(card.text(record, tmp_path, False, CALL)).data.base_model is None


def test_the_card_quotes_the_rate_that_was_saved(record, tmp_path):
    card.write(record, 0.2, tmp_path, tmp_path / "images", CALL)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert share_of_dense(record.points[1], record.dense, 0.05) in text
    assert share_of_dense(record.points[0], record.dense, 0.05) not in text
    assert not (tmp_path / card.STRIP).exists()  # no images are kept
    assert card.STRIP not in text


def test_the_strip_shows_dense_above_pruned(record, tmp_path):
    keep_images(record, tmp_path / "images", len(record.samples))
    card.write(record, 0.2, tmp_path, tmp_path / "images", CALL)
    made = np.asarray(Image.open(tmp_path / card.STRIP).convert("L")).astype(int)
    assert made.shape == (2 * card.EDGE, card.EDGE * min(card.SHOWN, len(record.samples)))
    assert abs(made[:card.EDGE] - 200).max() < 4
    assert abs(made[card.EDGE:] - 50).max() < 4


@pytest.mark.parametrize("python", [False, True])
def test_consent_to_run_code_is_asked_for_only_where_there_is_code(record, tmp_path, python):
    (tmp_path / "unet").mkdir()
    if python:
        (tmp_path / "unet" / "pruned_denoiser.py").write_text("")
    text = card.text(record, tmp_path, False, CALL)
    code = text.split("```python")[1].split("```")[0]
    ast.parse(code)
    assert ("trust_remote_code=True" in code) == python


def test_parts_that_the_pipeline_lacks_are_named_as_diffusers_asks(record, tmp_path):
    (tmp_path / "pruning.json").write_text('{"absent": ["text_encoder_3", "tokenizer_3"]}')
    code = card.text(record, tmp_path, False, CALL).split("```python")[1].split("```")[0]
    ast.parse(code)
    assert f'from_pretrained("{tmp_path.name}", text_encoder_3=None, tokenizer_3=None)' in code


def test_captions_are_no_markup(record, tmp_path):
    hostile = "`](x) **a** <img src=x>'"
    odd = replace(record, samples=[{**sample, "caption": hostile} for sample in record.samples])
    text = card.text(odd, tmp_path, True, signature.as_code(Guided, hostile, 20, 4.0))
    assert "`'](x) **a** <img src=x>'`" in text
    ast.parse(text.split("```python")[1].split("```")[0])


def test_the_card_calls_the_pipeline_as_the_measurement_did(record, tmp_path):
    code = card.text(record, tmp_path, False, signature.as_code(Guided, "it's red", 20, 4.0))
    call = ast.parse(code.split("```python")[1].split("```")[0]).body[-1].value.value.value
    assert [ast.literal_eval(each) for each in call.args] == ["it's red"]
    assert {each.arg: ast.literal_eval(each.value) for each in call.keywords} == {
        "num_inference_steps": 20, "true_cfg_scale": 4.0, "negative_prompt": " "}
    assert signature.as_code(Guided, "red", 20, 1.0) == "'red', num_inference_steps=20"
