"""COMMANDS: name -> module, for tests that go through all commands."""
from __future__ import annotations

from pathlib import Path

from pruning import (
    check_model,
    generate_synthetic_graph,
    merge_results,
    prefetch,
    pruning_analysis,
    test_single_rate,
    visualize_results,
)

COMMANDS = {Path(module.__file__).stem: module for module in (
    pruning_analysis, test_single_rate, prefetch, merge_results, visualize_results, generate_synthetic_graph,
    check_model)}
