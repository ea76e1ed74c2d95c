"""Whether layers of odd widths are slower. `benchmarks/removal.py --widths` runs this measurement."""
from __future__ import annotations

import statistics
from typing import List

import torch
from torch import nn
from tqdm import tqdm

from pruning.metrics import costs

MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
BASES = (1024, 1536)


def conv(inputs: int, outputs: int, **kind) -> nn.Conv2d:
    """Return a 3 x 3 convolution."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kind)


def measure_widths(device: str, rounds: int) -> List[dict]:
    """Time pairs of layers, one into a hidden width and one out of it, as removal leaves them.

    Returns a row for each layer and dtype. Its `times` are {multiple: time per unit of width, relative to widths that
    are multiples of 64}: the median over a width below and a width above each of the BASES, all divisible by the
    multiple and by no larger power of two.
    """
    # For one latent a GPU would run kernels faster than they are launched.
    batch = 8 if torch.device(device).type == "cuda" else 1
    layers = {"Linear 1280, 1024 tokens": (nn.Linear, 1280, (batch, 1024, 1280)),
              "Conv2d 320, 3 x 3, 32 x 32": (conv, 320, (batch, 320, 32, 32))}
    rows = []
    with tqdm(total=2 * len(layers) * len(BASES), desc="widths") as bar:
        for layer, (make, outer, shape) in layers.items():
            for dtype in (torch.float32, torch.bfloat16):
                kind, ratios = {"device": device, "dtype": dtype}, {multiple: [] for multiple in MULTIPLES}
                for base in BASES:
                    widths = [base + step for multiple in MULTIPLES for step in (-multiple, multiple)]
                    pairs = [nn.Sequential(make(outer, n, **kind), make(n, outer, **kind)) for n in widths]
                    call = {"input": torch.randn(shape, **kind)}
                    each = [seconds / n for n, seconds in zip(widths, costs.denoiser_seconds(pairs, call, rounds))]
                    for i, multiple in enumerate(MULTIPLES):
                        ratios[multiple] += [own / statistics.mean(each[:2]) for own in each[2 * i:2 * i + 2]]
                    bar.update()
                rows.append({"layer": layer, "dtype": str(dtype).split(".")[1],
                             "times": {str(multiple): statistics.median(found) for multiple, found in ratios.items()}})
    return rows
