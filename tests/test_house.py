"""The layout holds: imports run one way, files stay small, and no command loads torch before it needs torch."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRUNING = ROOT / "pruning"
COMMANDS = {"pruning_analysis", "test_single_rate", "visualize_results", "generate_synthetic_graph", "merge_results",
            "prefetch", "check_model"}
SLOW_TO_IMPORT = {"torch", "scipy", "diffusers", "transformers", "pooch", "requests"}
# Modules that may import rooms, and that no room may import.
TOP = COMMANDS | {"cli", "console", "sweep", "experiment", "steps", "baselines", "originals"}


def imported(path):
    """The modules of this project that a file imports, as ('pruning.x.y', imported name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pruning":
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pruning":
                    yield alias.name, ""


def top_modules(path):
    """The names of top-level modules that a file imports."""
    for module, name in imported(path):
        parts = [*module.split("."), name]
        if parts[1] in TOP:
            yield parts[1], parts[2] if len(parts) > 2 else ""


@pytest.mark.parametrize("path", sorted(PRUNING.rglob("*.py")), ids=lambda path: str(path.relative_to(PRUNING)))
def test_imports_run_from_commands_to_rooms(path):
    above = {"sweep": COMMANDS, "steps": COMMANDS | {"sweep"}, "experiment": COMMANDS | {"sweep", "steps", "baselines"},
             "baselines": COMMANDS | {"sweep", "steps"}, "originals": {"experiment", "steps"},
             "cli": COMMANDS | {"sweep", "experiment", "console"}}
    for module, name in top_modules(path):
        if module in COMMANDS:
            # The document of the commands defines the function in that file, and a single rate needs it too.
            assert (path.stem, module, name) == ("test_single_rate", "pruning_analysis", "run_pruning_experiment")
        else:
            assert path.parent == PRUNING
            assert path.stem in above[module]


@pytest.mark.parametrize("path", sorted(PRUNING.rglob("*.py")), ids=lambda path: str(path.relative_to(PRUNING)))
def test_files_are_short_enough_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 360 or path.name == "train.py", lines


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_runs_from_anywhere_with_an_example_and_without_torch(command, tmp_path):
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(PRUNING)!r})\n" \
           f"try: runpy.run_path({str(PRUNING / (command + '.py'))!r}, run_name='__main__')\n" \
           f"except SystemExit: sys.exit(', '.join({SLOW_TO_IMPORT!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "example:" in done.stdout
    assert "default: " in done.stdout


def test_drawing_records_needs_no_torch(tmp_path):
    record = ROOT / "results/bundled/shapes-unet/shapes/magnitude.json"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pruning import visualize_results\n" \
           f"visualize_results.main(['--results_file', {str(record)!r}, '--output_dir', {str(tmp_path)!r}])\n" \
           "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "magnitude.png").exists()
