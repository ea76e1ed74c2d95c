"""The options that methods have, which are the flags of the commands. No torch."""
from __future__ import annotations

import argparse
from typing import Any, Callable, Dict, NamedTuple, Sequence, Tuple

from pruning import UserError, check_name

SCOPES = ("row", "layer", "global")
PATTERNS = ("2:4", "4:8")
ALLOCATIONS = ("uniform", "guided")
CRITERIA = ("loss", "norm")
# Budget -> its unit in records, and how many of these make what budgets.prices counts in.
BUDGETS = {"macs": ("multiply-accumulates", 1), "parameters": ("parameters", 1), "time": ("microseconds", 1e6)}
STEP_WEIGHTS = ("uniform", "early", "late")


class Option(NamedTuple):
    """An option of a method, which the commands offer as a flag."""

    default: Any
    type: Callable[[str], Any]  # text -> value, or an error that argparse shows; `bool`: a flag without a value
    help: str  # what the option does; the commands add its default and the methods that have it


def one_of(what: str, names) -> Callable[[str], str]:
    """Return an argument type that takes one of `names`, and for another name suggests the nearest."""
    def parse(text: str) -> str:
        try:
            return check_name(what, text, names)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


def at_least(least: int, most: int = 2 ** 32 - 1) -> Callable[[str], int]:
    """Return an argument type that takes whole numbers from `least` to `most`."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more; got {text!r:.40}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected a whole number, {most} or less; got {text!r:.40}")
        return value
    return parse


SCOPE = Option("layer", one_of("scope", SCOPES),
               "compare weights within each row, within each layer or, with global, over the whole denoiser")
PATTERN = Option(None, one_of("pattern", PATTERNS),
                 "let exactly n of every m weights along the input channels stay; the rate is then 1 - n/m")
REFIT = Option(False, bool, "give the weights that stay new values, by least squares on calibration inputs")
ALLOCATION = Option("uniform", one_of("allocation", ALLOCATIONS),
                    "take the same share of every layer or, with guided, more where the output depends less on it")
RECOVERY_STEPS = Option(0, at_least(0), "training steps of self-distillation after zeroing (iterative: after each rate "
                                        "of its schedule), 0 for none")
CALIBRATION_IMAGES = Option(32, at_least(1), "images of training captions that the dense model draws to calibrate on")
MASK_ONLY = Option(False, bool, "zero units in place instead of removing them")
CRITERION = Option("loss", one_of("criterion", CRITERIA),
                   "which units go first: loss, those that the layers behind them can best do without, or norm, those "
                   "of lowest weights")
ROUND_TO = Option(0, at_least(0), "let widths that are a multiple of this number stay one; 0 for 8 in half precision, "
                                  "whose GPU kernels take up to twice as long at odd widths, and for 1 in float32")
BUDGET = Option("macs", one_of("budget", BUDGETS),
                "what the rate is a share of: macs (multiply-accumulates), parameters, or time (of each layer's calls)")
REMOVING = {"criterion": CRITERION, "allocation": ALLOCATION, "refit": REFIT._replace(default=True),
            "mask_only": MASK_ONLY, "recovery_steps": RECOVERY_STEPS, "calibration_images": CALIBRATION_IMAGES}
ZEROING = {"pattern": PATTERN, "refit": REFIT, "allocation": ALLOCATION, "recovery_steps": RECOVERY_STEPS,
           "calibration_images": CALIBRATION_IMAGES}


def pattern_of(text: str) -> Tuple[int, int]:
    """Return (n, m) of "n:m": of every m weights, n stay."""
    stay, every = text.split(":")
    return int(stay), int(every)


def check_together(options: Dict[str, Any], rates: Sequence[float]) -> None:
    """Raise UserError if options exclude each other or the rates."""
    pattern, guided = options.get("pattern"), options.get("allocation") == "guided"
    if pattern:
        stay, every = pattern_of(pattern)
        share = 1 - stay / every
        if set(rates) - {0, share}:
            raise UserError(f"a {pattern} pattern zeroes exactly {share:g} of the weights; give that rate alone "
                            f"(--rates {share:g})")
        if guided or options.get("scope") == "global":
            raise UserError(f"a {pattern} pattern takes the same share of every layer; leave out --allocation guided "
                            "and --scope global")
    if options.get("mask_only") and options["recovery_steps"]:
        raise UserError("--mask_only shows what removal does, and recovery would train what is zeroed; leave out one "
                        "of --mask_only and --recovery_steps")
    if guided and options.get("scope") == "global":
        raise UserError("--allocation guided and --scope global both decide what each layer loses; give one of them")
