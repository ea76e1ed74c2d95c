"""The ways to prune. One literal table, one file per method, and the surgery they share.

A method's file has prune(denoiser, rate, **options) -> Pruned, which changes
the denoiser in place. This table loads without torch.
"""
from __future__ import annotations

import importlib
from typing import Any, Dict, NamedTuple


class Method(NamedTuple):
    """What the commands know of a method without loading it."""

    help: str
    module: str  # the file in this folder
    unit: str  # what the rate is a share of
    options: Dict[str, Any]  # keyword arguments of prune() that the commands offer as flags, with their defaults
    removes: bool = False  # units are taken out and shapes shrink, unless masked
    recovers: bool = False  # needs recorded denoiser calls to train on


class Pruned(NamedTuple):
    """What a method did: `taken` of `total` units, where `asked` was round(rate * total)."""

    unit: str
    total: int
    asked: int
    taken: int
    left_out: Dict[str, str] = {}  # modules that it might be thought to prune and does not: name -> why


METHODS = {
    "magnitude": Method("zero the weights of lowest |w|", "magnitude", "weights", {"scope": "layer"}),
    "structured": Method("remove feed-forward neurons and ResNet inner channels of lowest L2 norm",
                         "structured", "neurons and channels", {"mask_only": False, "round_to": 1}, removes=True),
    "iterative": Method("magnitude in steps, with self-distillation after each", "iterative", "weights",
                        {"scope": "layer", "recovery_steps": 60}, recovers=True),
    "attention_heads": Method("remove whole attention heads, ranked over the denoiser",
                              "attention_heads", "heads", {"mask_only": False}, removes=True),
}


def prune(method: str, denoiser, rate: float, **options) -> Pruned:
    """Prune `denoiser` in place by a method of the table; rate in [0, 1)."""
    return importlib.import_module(f"{__name__}.{METHODS[method].module}").prune(denoiser, rate, **options)
