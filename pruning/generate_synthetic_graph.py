"""Draw the EXPECTED relation of pruning rate and accuracy for each method, without measuring anything.

example:
  python pruning/generate_synthetic_graph.py --output_dir /tmp/expected --noise 0.02
"""
from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

from pruning import cli
from pruning.methods import METHODS
from pruning.records import plots
from pruning.records.record import write_json

NOTICE = "SYNTHETIC - not a measurement: illustrative curves of what one might expect, no model was run"
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Curve(NamedTuple):
    """A falling logistic curve. At the knee, about half of the dense accuracy is left."""

    knee: float
    steepness: float
    why: str


# Illustrations that follow what the mean of the two bundled models kept in results/. Other models differ.
EXPECTED = {
    "magnitude": Curve(0.70, 20, "measured up to 0.9: holds up to 0.5, is lost at 0.8"),
    "structured": Curve(0.94, 20, "measured up to 0.8, beyond it a guess: the re-fit holds what removal by norm loses"),
    "iterative": Curve(0.86, 33, "measured up to 0.9: recovery moves the knee of magnitude"),
    "reconstruct": Curve(0.97, 40, "measured up to 0.9: re-fitted weights move the knee further"),
    "attention_heads": Curve(0.85, 14, "measured up to 0.7, beyond it a guess"),
    "blocks": Curve(0.48, 18, "measured up to 0.34, beyond it a guess"),
    "joint": Curve(0.80, 17, "measured up to 0.7, beyond it a guess"),
    "modulation": Curve(0.99, 60, "measured from 0.75 to 0.95, elsewhere a guess: the time lives in few directions"),
    "wanda": Curve(0.725, 25, "measured up to 0.9: knowing the inputs moves the knee of magnitude a little"),
    "sparsegpt": Curve(0.805, 20, "measured up to 0.9: correcting the other weights moves the knee further"),
}


def expected_accuracy(rate: float, curve: Curve) -> float:
    """Return the accuracy relative to the dense model: a logistic in the rate, scaled to 1 at rate 0."""
    return (1 + math.exp(-curve.steepness * curve.knee)) / (1 + math.exp(curve.steepness * (rate - curve.knee)))


def synthetic_curves(noise: float, seed: int) -> dict:
    """Return {method: its curve and its values with and without noise}, one value for each of RATES.

    noise: standard deviation. The noise of a method depends only on the seed and the method's name.
    """
    curves = {}
    for method in (method for method in METHODS if method in EXPECTED):
        generator = random.Random(f"{seed} {method}")
        expected = [expected_accuracy(rate, EXPECTED[method]) for rate in RATES]
        noisy = [value + (generator.gauss(0, noise) if rate else 0) for rate, value in zip(RATES, expected)]
        curves[method] = {**EXPECTED[method]._asdict(), "expected": expected, "accuracy": noisy}
    return curves


def share(text: str) -> float:
    """Return a number in [0, 1]. Raises ArgumentTypeError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"noise is a share of the dense accuracy in [0, 1]; got {text!r}")
    return value


def main(argv=None) -> None:
    """Parse the command line, write both files, and print their paths."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", metavar="DIR", type=Path, default=cli.RESULTS / "synthetic",
                        help="where to write synthetic.json and synthetic.png")
    parser.add_argument("--noise", type=share, default=0.05, help="standard deviation of the noise on each value")
    parser.add_argument("--seed", type=cli.not_negative, default=42, help="seed of the noise")
    args = parser.parse_args(argv)

    curves = synthetic_curves(args.noise, args.seed)
    without = [method for method, entry in METHODS.items() if method not in curves and not entry.baseline]
    write_json({"synthetic": True, "notice": NOTICE, "noise": args.noise, "seed": args.seed, "rates": list(RATES),
                "methods_without_expectation": without, "curves": curves}, args.output_dir / "synthetic.json")
    print(args.output_dir / "synthetic.json")
    print(plots.draw_synthetic(RATES, curves, args.output_dir / "synthetic.png"))
    if without:
        print(f"not drawn, because EXPECTED has no curve for them: {', '.join(without)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
