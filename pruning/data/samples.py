"""The types of a data set, and the seeded order that chooses among its samples."""
from __future__ import annotations

from pathlib import Path
from typing import Callable, List, NamedTuple, Optional

import numpy as np
from PIL import Image

from pruning import UserError
from pruning.data.faults import Faults


class Sample(NamedTuple):
    """One caption with its original image, if the data set has originals."""

    id: str  # the same in every run
    caption: str
    open_image: Optional[Callable[[], Image.Image]]  # returns the original: RGB, at its own size
    repeat: int = 0  # added to the noise seed: the same caption once more, from other noise
    file: Optional[Path] = None  # the file of the original, or None if the original is drawn


class Source(NamedTuple):
    """A data set that was read: all its samples, and the rules in which it differs from other data sets."""

    samples: List[Sample]  # in any order
    faults: Faults = {}  # what was skipped while it was read
    provide: Callable[[List[Sample]], None] = lambda samples: None  # fetches or checks images; raises UserError
    has: Callable[[Sample], bool] = lambda sample: True  # whether `provide` can succeed for the sample
    # (count, seed) -> up to `count` training captions. None: the captions of samples that are not measured.
    training: Optional[Callable[[int, int], List[str]]] = None
    # () -> the samples whose images are the reference set. None: the measured samples.
    reference: Optional[Callable[[], List[Sample]]] = None


class Dataset(NamedTuple):
    """The entry of a data set: what flags and messages need, and the function that reads the data set."""

    help: str
    default_model: str
    backbones: str  # the default metric networks: "bundled" or "standard"
    read: Callable[[Optional[Path]], Source]  # takes --data_dir, or None if that flag is absent
    originals: bool = True  # whether captions have original images; if not, metrics that need them are left out


def permutation(count: int, seed: int) -> np.ndarray:
    """Return the numbers 0 to `count` - 1 in an order that depends on `seed` alone, as an array of shape (count,).

    Raises UserError if `seed` is not in [0, 2**32).
    """
    try:
        return np.random.RandomState(seed).permutation(count)  # numpy keeps this stream the same in all releases
    except ValueError as error:
        raise UserError(f"seed {seed}: {error}") from error
