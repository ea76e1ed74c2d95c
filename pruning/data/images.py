"""Original images: opened as RGB and brought to one size."""
from __future__ import annotations

from typing import List, Optional

import numpy as np
from PIL import Image, ImageOps

from pruning import UserError
from pruning.data.faults import Faults, note
from pruning.data.samples import Sample

RESIZE_RULE = "largest centred square, antialiased bicubic"  # what fit_image does, for the record


def open_rgb(path) -> Image.Image:
    """Open an image file as RGB, turned upright by its EXIF orientation, with white where it is transparent.

    Raises UserError if the file is missing or broken, an animation, or of numbers whose range is not known.
    """
    try:
        with Image.open(path) as image:
            return _as_rgb(image)
    except Exception as error:  # Pillow raises many types of errors for broken files
        raise UserError(f"cannot read the image {path} ({error}): replace the file") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # cameras add a preview to a JPEG as an MPO
        raise ValueError(f"it has {image.n_frames} frames")
    upright = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I" and image.format == "PNG":  # 16-bit grey, by Pillow's release
        return _grey_from_16_bits(upright).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} does not say which number is white; save it with 8 bits")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey image in 8 bits. Pillow's own conversion makes all but the 256 darkest values white."""
    values = np.asarray(image).astype(np.int64)
    values[values == image.info.get("transparency")] = 65535
    return Image.fromarray(((255 * values + 32767) // 65535).astype(np.uint8))


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an image, resized to `size` x `size` pixels, as RGB."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # ImageOps.fit resizes before it crops, so pixels outside the square would leak into its edge.
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def load_originals(samples: List[Sample], size: int, broken: Optional[Faults] = None) -> np.ndarray:
    """Return the original images of `samples`, fitted by `fit_image`, as uint8 (n, size, size, 3).

    broken: gets the images that cannot be read, so that all of them can be named; their rows hold nothing. None: the
    first one raises UserError.
    """
    originals = np.empty((len(samples), size, size, 3), np.uint8)
    for sample, row in zip(samples, originals):
        try:
            row[:] = fit_image(sample.open_image(), size)
        except UserError as error:
            if broken is None:
                raise
            note(broken, f"Images in {sample.file.parent} that cannot be read", f"{sample.id}: {error.__cause__}")
    return originals
