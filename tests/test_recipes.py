"""The recipes of docs/extending.md work as they stand there: the additions are made in a copy of the code and run."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXTENDING = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
QUICK = ["--num_images", "5", "--steps", "2", "--device", "cpu", "--rates", "0.5"]
# Where a recipe's "in NAME, file" is in the file: the line that opens NAME. "imports" is before the first table.
OPENINGS = {"measurements": r"        return \{\n", "imports": r"^(?=# [A-Z]|[A-Z_]{4,}\b.* = )"}


def make_additions(root):
    """Make all additions of the page in a copy of the code below `root`, and return how many."""
    shutil.copytree(ROOT / "pruning", root / "pruning", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n# (?:in (\w+), )?(\S+\.py)\n(.*?)```", EXTENDING, re.DOTALL)
    for table, file, code in blocks:
        path = root / file
        if table:
            text = path.read_text(encoding="utf-8")
            opening = OPENINGS.get(table, rf"^{table}\b.* = [{{(]\n")
            found = re.search(opening, text, re.MULTILINE)
            assert found, (table, file)
            path.write_text(text[:found.end()] + code + text[found.end():], encoding="utf-8")
        else:
            assert not path.exists(), file
            path.write_text(code, encoding="utf-8")
    return len(blocks)


def run(root, *flags):
    """Run the sweep of the copy on few images, and return the folder of its record and the record."""
    done = subprocess.run([sys.executable, str(root / "pruning" / "pruning_analysis.py"), *QUICK, *flags],
                          capture_output=True, text=True, cwd=str(root))
    assert done.returncode == 0, done.stderr
    record, = (root / "results").rglob("*+*.json") if "--power" in flags else (root / "results").rglob("time_*.json")
    return record.parent, json.loads(record.read_text())


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    root = tmp_path_factory.mktemp("extended")
    assert make_additions(root) == 12
    return root


@pytest.fixture(scope="module")
def weighed(extended):
    """The sweep of the new method, with its option, the new metric and the new output file."""
    return run(extended, "--method", "input_rms", "--power", "0.5")


def test_a_method_is_a_file_and_an_entry_and_its_options_are_flags_and_name_the_record(weighed):
    folder, record = weighed
    assert (folder / "input_rms+power=0.5.json").exists()
    assert record["options"] == {"power": 0.5, "calibration_images": 8}
    assert record["points"][0]["sparsity"] == pytest.approx(0.5, abs=1e-6)


def test_a_method_that_declares_calibration_gets_calls_of_the_dense_denoiser(weighed):
    assert weighed[1]["points"][0]["metrics"]["clip_score"] is not None


def test_a_metric_is_an_entry_and_a_line(weighed):
    point = weighed[1]["points"][0]
    assert point["metrics"]["contrast"] > 0
    assert len(point["per_image"]["contrast"]) == 5


def test_an_output_file_is_a_function_and_an_entry(weighed):
    lines = (weighed[0] / "input_rms+power=0.5.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["rate", "---", "0", "0.5"]


def test_a_unit_is_a_row_and_a_data_set_a_function_and_an_entry(extended, tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.txt").write_text("a large red circle on a white background")
        Image.fromarray(np.full((64, 64, 3), 30 * index, np.uint8)).save(tmp_path / f"{index}.png")
    _, record = run(extended, "--method", "time_neurons", "--dataset", "pairs", "--data_dir", str(tmp_path), "--model",
                    "shapes-unet", "--metric_backbones", "bundled", "--criterion", "norm", "--refit", "off")
    point, dense = record["points"][0], record["dense"]
    assert record["dataset"] == "pairs"
    assert point["units_taken"] == point["units_total"] // 2
    assert point["parameters"] < dense["parameters"]
    assert point["skipped_modules"] == {}


def test_a_new_unit_leaves_the_other_methods_as_they_were(extended):
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pruning import methods\nfrom pruning.models.pipelines import load_pipeline\n"
            "for method in ('attention_heads', 'structured'):\n"
            "    unet = load_pipeline('shapes-unet').unet\n"
            "    pruned = methods.prune(method, unet, 0.5, criterion='norm', refit=False)\n"
            "    print(pruned.total, pruned.taken, unet.num_parameters())")
    printed = [subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True,
                              cwd=str(root)).stdout for root in (ROOT, extended)]
    assert printed[0] == printed[1] != ""
