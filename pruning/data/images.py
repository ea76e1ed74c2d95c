"""Original images: opened as RGB and brought to one size."""
from __future__ import annotations

from typing import List

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pruning import UserError
from pruning.data.samples import Sample

RESIZE_RULE = "largest centred square, antialiased bicubic"  # what fit_image does, for the record


def open_rgb(path) -> Image.Image:
    """Open an image file as RGB, turned upright by its EXIF orientation.

    Raises UserError if the file is missing or broken.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many types of errors for broken files
        raise UserError(f"cannot read the image {path} ({error}): replace the file") from error


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an image, resized to `size` x `size` pixels, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # ImageOps.fit resizes before it crops, so pixels outside the square would leak into its edge.
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def load_originals(samples: List[Sample], size: int) -> np.ndarray:
    """Return the original images of `samples`, fitted by `fit_image`, as uint8 (n, size, size, 3).

    Raises UserError if an image file is missing or broken.
    """
    originals = np.empty((len(samples), size, size, 3), np.uint8)
    for sample, row in zip(tqdm(samples, desc="originals", delay=1), originals):
        row[:] = fit_image(sample.open_image(), size)
    return originals
