"""The commands as console scripts of the installed package, see pyproject.toml."""
from __future__ import annotations

import importlib

from pruning import cli


def _script(command: str):
    def run() -> None:
        cli.run(importlib.import_module(f"pruning.{command}").main)
    return run


analysis = _script("pruning_analysis")
single_rate = _script("test_single_rate")
visualize = _script("visualize_results")
synthetic = _script("generate_synthetic_graph")
merge = _script("merge_results")
prefetch = _script("prefetch")
check = _script("check_model")
