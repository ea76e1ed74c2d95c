"""What the commands share: one-line errors, argument types, exit codes. No torch."""
from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from pruning import UserError, check_name
from pruning.records.findings import QUALITY, TOLERANCE

ROOT = Path(__file__).resolve().parents[1]


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the example in the description as it was written."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.default is argparse.SUPPRESS:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        if isinstance(action.default, Path) and ROOT in action.default.parents:
            return f"{action.help} (default: {action.default.relative_to(ROOT)} in the repository)"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        """Exit with 2 and one line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def rate(text: str) -> float:
    """A pruning rate: a number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a rate is a number from 0 up to, but not, 1; got {text!r}")
    return value


def at_least(least: int, text: str) -> int:
    """A whole number, `least` or more."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more; got {text!r}")
    return value


def tolerance(text: str) -> float:
    """A share of the dense model's quality that may be lost: a number in (0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a tolerance is a share between 0 and 1; got {text!r}")
    return value


def add_tolerance(parser) -> None:
    """The flag of all commands that say how far a model can be pruned."""
    parser.add_argument("--tolerance", type=tolerance, default=TOLERANCE,
                        help=f"share of the dense model's {QUALITY} that pruning may cost")


def shard(text: str) -> tuple:
    """Which part of several: 'i/n' with i from 1 to n."""
    part, slash, count = text.partition("/")
    if not (slash and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is i/n with i from 1 to n, 2/4 say; got {text!r}")
    return int(part), int(count)


positive = partial(at_least, 1)
not_negative = partial(at_least, 0)


def name_in(what: str, names):
    """An argument type that takes one of `names` and suggests the nearest to a wrong one."""
    def parse(text):
        try:
            return check_name(what, text, names)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse


def run(main) -> None:
    """Run a command: exit code 2 and one line for a UserError, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; finished points are kept, the same command goes on from them", file=sys.stderr)
        sys.exit(130)
