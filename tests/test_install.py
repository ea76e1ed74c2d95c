"""Installed as a package, the commands are console scripts that run anywhere and hold the bundled models."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pruning import console

ROOT = Path(__file__).resolve().parents[1]


def test_every_command_has_a_console_script():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    commands = [path.stem for path in (ROOT / "pruning").glob("*.py") if "cli.run(main)" in path.read_text("utf-8")]
    scripts = [name for name, value in vars(console).items() if callable(value) and not name.startswith("_")]
    assert len(scripts) == len(commands)
    assert all(f'"pruning.console:{name}"' in text for name in scripts)


@pytest.mark.slow
def test_the_installed_package_measures_the_bundled_model_and_writes_below_the_current_folder(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "pruning", source / "pruning", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    made = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), "."],
                          cwd=source, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"pip cannot build here: {made.stderr.strip().splitlines()[-1]}")
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "pruning-single-rate"), "--rate", "0.2", "--num_images", "2", "--steps",
         "1", "--metrics", "clip_score"], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere/results/single_rate/shapes-unet/shapes/magnitude.json").is_file()
