"""The ways to prune: one table, and a file for each method in it.

The file of method "x" is methods/x.py. Its prune(denoiser, rate, *, calibration=None, **options) -> Pruned prunes
the denoiser in place and is given every option of the table. This table loads without torch.
"""
from __future__ import annotations

import argparse
import importlib
import re
from typing import Any, Callable, Dict, NamedTuple

from pruning import UserError, check_name

SCOPES = ("layer", "global")


class Option(NamedTuple):
    """An option of a method, which the commands offer as a flag."""

    default: Any
    type: Callable[[str], Any]  # text -> value, or an error that argparse shows; `bool`: a flag without a value
    help: str  # what the option does; the commands add its default and the methods that have it


class Method(NamedTuple):
    """What the commands know of a method without loading it."""

    help: str
    unit: str  # what the rate is a share of
    options: Dict[str, Option] = {}  # two methods may share the name of an option if its type is the same
    removes: bool = False  # whether units are removed, so that shapes shrink, unless they are masked
    calibration_images: int = 0  # images whose denoiser calls are recorded for the method

    @property
    def calibrates(self) -> bool:
        """Whether prune() is given a Calibration."""
        return self.calibration_images > 0


class Pruned(NamedTuple):
    """What a method did: `taken` of `total` units are pruned, and round(rate * total) were asked for."""

    unit: str
    total: int
    asked: int
    taken: int
    skipped_modules: Dict[str, str] = {}  # modules that seem prunable and were not pruned: name -> why


def one_of(what: str, names) -> Callable[[str], str]:
    """Return an argument type that takes one of `names`, and for another name suggests the nearest."""
    def parse(text: str) -> str:
        try:
            return check_name(what, text, names)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type that takes whole numbers from `least`."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more; got {text!r}")
        return value
    return parse


SCOPE = Option("layer", one_of("scope", SCOPES),
               "compare weights within each layer or, with global, over the whole denoiser")
MASK_ONLY = Option(False, bool, "zero units in place instead of removing them")

METHODS: Dict[str, Method] = {
    "magnitude": Method("zero the weights of lowest |w|", "weights", {"scope": SCOPE}),
    "structured": Method(
        "remove feed-forward neurons and ResNet inner channels of lowest L2 norm", "neurons and channels",
        {"mask_only": MASK_ONLY,
         "round_to": Option(1, at_least(1), "let widths that are a multiple of this number stay one, as kernels may be "
                                            "slower at odd widths")}, removes=True),
    "iterative": Method(
        "magnitude in steps, with self-distillation after each", "weights",
        {"scope": SCOPE,
         "recovery_steps": Option(60, at_least(0), "training steps after each rate of the schedule, 0 for none")},
        calibration_images=128),
    "attention_heads": Method("remove whole attention heads, ranked over the denoiser", "heads",
                              {"mask_only": MASK_ONLY}, removes=True),
    "reconstruct": Method(
        "zero weights that the guided output feels least, and re-fit the others by least squares", "weights",
        calibration_images=32),
}


def default_options(method: str) -> Dict[str, Any]:
    """Return the options of a method with their defaults. Raises UserError if METHODS does not have the method."""
    return {name: option.default for name, option in METHODS[check_name("method", method, METHODS)].options.items()}


def variant_name(method: str, options: Dict[str, Any]) -> str:
    """Return the method's name and the options that differ from their defaults, such as "magnitude+scope=global".

    Options stand in the order of METHODS, then options that METHODS does not know, by name. An option that is True is
    just its name. The text is fit for a file name: in options, all but letters, digits and "_.-" becomes "-".
    """
    known = METHODS[method].options if method in METHODS else {}
    parts = [method]
    for name in [*known, *sorted(set(options) - set(known))]:
        if name in options and not (name in known and options[name] == known[name].default):
            texts = [name] if options[name] is True else [name, str(options[name])]
            parts.append("=".join(re.sub(r"[^\w.-]", "-", text) for text in texts))
    return "+".join(parts)


def prune(method: str, denoiser, rate: float, *, calibration=None, **options) -> Pruned:
    """Prune `denoiser` (a torch module) in place by a method of the table, and return what was done.

    options: those of the method that differ from their defaults. calibration: a calibration.Calibration, for methods
    with calibration_images. Raises UserError if the rate is not in [0, 1), if the method, an option or its value is
    not known, if the denoiser has nothing that the method prunes, and for whatever else the method's file names.
    """
    if not 0 <= rate < 1:
        raise UserError(f"a pruning rate is in [0, 1); got {rate}")
    given = {**default_options(method), **options}
    for name, value in options.items():
        check_option(method, name, value)
    if not METHODS[method].calibrates:
        calibration = None
    return importlib.import_module(f"{__name__}.{method}").prune(denoiser, rate, calibration=calibration, **given)


def check_option(method: str, name: str, value: Any) -> None:
    """Raise UserError if the method has no such option, or if the option's flag would not take the value."""
    option = METHODS[method].options[check_name(f"option of {method}", name, METHODS[method].options)]
    if option.type is bool and not isinstance(value, bool):
        raise UserError(f"{name}: expected True or False; got {value!r}")
    try:
        if value != option.default:
            option.type(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
