"""benchmarks/removal.py measures the costs of bundled and random models, and continues an earlier run."""
from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import denoisers, removal
from pruning import UserError
from pruning.methods import surgery

TINY = denoisers.Model(1, "UNet2DConditionModel", {
    "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (32, 64),
    "cross_attention_dim": 24, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, {"cpu": 8},
    lambda side: {"sample": (1, 4, side, side), "timestep": (1,), "encoder_hidden_states": (1, 5, 24)})


def measure(folder, *arguments):
    """Run the command and return its rows by (method, rate)."""
    removal.main(["--output_dir", str(folder), "--rounds", "1", "--device", "cpu", *arguments])
    path, = folder.glob("removal_*.json")
    return {(row["method"], row["rate"]): row for row in json.loads(path.read_text())["rows"]}


def test_costs_fall_with_the_rate_and_a_second_run_keeps_the_rows_of_the_first(tmp_path, capsys):
    ours = ["--models", "shapes-unet", "--methods", "structured", "attention_heads"]
    first = measure(tmp_path, *ours, "--rates", "0.5")
    rows = measure(tmp_path, *ours, "--rates", "0.5", "0.9")
    assert {key: rows[key] for key in first} == first  # not measured again
    for method in ("structured", "attention_heads"):
        for cost in ("parameters", "macs", "peak_bytes"):
            assert rows[method, 0.9][cost] < rows[method, 0.5][cost] < rows["dense", 0.0][cost]
    assert all(row["seconds"] > 0 and row["dense_seconds"] > 0 for row in rows.values())
    assert (tmp_path / "removal.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "removal.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="overwrite"):
        measure(tmp_path, *ours, "--latent", "8")
    assert set(measure(tmp_path, *ours, "--rates", "0.5", "--latent", "8", "--overwrite")) == set(first)


def test_masks_save_nothing_and_a_missing_library_is_reported_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    masks = ["--models", "shapes-unet", "--rates", "0.5", "--methods", "magnitude", "torch_masks", "torch_pruning"]
    rows = measure(tmp_path, *masks)
    dense = rows["dense", 0.0]
    for method in ("magnitude", "torch_masks"):
        assert {cost: rows[method, 0.5][cost] for cost in ("parameters", "macs")} == {
            cost: dense[cost] for cost in ("parameters", "macs")}
    assert rows["magnitude", 0.5]["peak_bytes"] == dense["peak_bytes"]
    assert rows["torch_masks", 0.5]["peak_bytes"] > 2.5 * dense["peak_bytes"]
    assert rows["torch_pruning", 0.5]["error"] == removal.NOT_INSTALLED


def test_the_error_of_a_peer_is_reported_in_its_row(tmp_path, monkeypatch):
    def fail(denoiser, rate, call):
        raise ValueError("the first line\nand a second")

    monkeypatch.setitem(removal.PRUNERS, "torch_masks", removal.PRUNERS["torch_masks"]._replace(peer=fail))
    rows = measure(tmp_path, "--models", "shapes-unet", "--rates", "0.5", "--methods", "torch_masks")
    assert rows["torch_masks", 0.5]["error"].startswith("ValueError: the first line (test_removal_benchmark.py:")


def test_random_models_are_repeatable_and_their_units_have_different_scores(tmp_path, monkeypatch):
    monkeypatch.setitem(denoisers.MODELS, "sd15", TINY)
    settings = {"latent": 8, "dtype": "float32", "layers": None}
    (one, call), (other, _) = (denoisers.random_denoiser(TINY, settings, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    for group in surgery.survey(one, "heads", "neurons", "channels")[0]:
        scores = surgery.root_mean_square(group)
        assert scores.std() > 0.1 * scores.mean()
    with torch.no_grad():
        assert one(**call).sample.isfinite().all()

    rows = measure(tmp_path, "--models", "sd15", "--rates", "0.1", "0.5", "--methods", "structured", "magnitude",
                   "torch_masks")
    assert list(rows) == [("dense", 0.0), ("structured", 0.1), ("structured", 0.5), ("magnitude", 0.5)]
