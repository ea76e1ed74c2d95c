"""What lies on disk beside a record: images with their provenance, cached features and a lock. No torch."""
from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import shutil
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterable, NamedTuple, Optional, Tuple

import filelock
import numpy as np
from PIL import Image, PngImagePlugin

from pruning import UserError, cache_folder, whole_file
from pruning.progress import tqdm


class Made(NamedTuple):
    """An image, and how it was generated."""

    pixels: Optional[np.ndarray]  # uint8 (h, w, 3); None if they were let go
    finite: bool  # whether the pipeline gave finite numbers for every pixel
    seconds: float  # the time of its batch, divided by the images of the batch
    calls: int  # how often the denoiser was called for its batch


def rate_folder(rate: float) -> str:
    """Return the name of the folder of a rate: 'dense' for 0, else the rate with all its digits."""
    return repr(float(rate)) if rate else "dense"


def image_file(images_folder, variant: str, rate: float, index: int) -> Path:
    """Return the path of the image of the index-th sample: IMAGES/VARIANT/RATE/0000.png."""
    return Path(images_folder) / variant / rate_folder(rate) / f"{index:04d}.png"


def save_image(made: Made, path: Path, provenance: str) -> None:
    """Write an image as PNG with its provenance, whole or not at all. Raises UserError if that fails."""
    text = PngImagePlugin.PngInfo()
    for name, value in (("provenance", provenance), ("finite", str(int(made.finite))),
                        ("seconds", repr(float(made.seconds))), ("calls", str(int(made.calls))),
                        ("pixels", content_hash(made.pixels))):
        text.add_text(name, value)
    # Without sync: if a power cut leaves half a file, load_image sets that aside and the image is generated again.
    with whole_file(path, sync=False) as part:
        Image.fromarray(made.pixels).save(part, format="PNG", pnginfo=text, compress_level=1)


def load_image(path: Path, provenance: str) -> Optional[Made]:
    """Return the image at `path`, or None if there is none with this provenance.

    A file that cannot be read is renamed, with a message.
    """
    try:
        with Image.open(path) as image:
            if image.info.get("provenance") != provenance or "pixels" not in image.info:
                return None
            made = Made(np.asarray(image.convert("RGB")), image.info["finite"] == "1", float(image.info["seconds"]),
                        int(image.info["calls"]))
            if not (math.isfinite(made.seconds) and made.seconds > 0):
                raise ValueError(f"its time is {made.seconds}")
            if image.info["pixels"] != content_hash(made.pixels):
                raise ValueError("its pixels are not those that were written")
            return made
    except FileNotFoundError:
        return None
    except Exception as error:  # Pillow raises many types of exception for broken bytes
        tqdm.write(f"{path} is not a readable image ({error}): {set_aside(path)}, and generated again")
        return None


def made_by(path: Path, provenance: str) -> bool:
    """Return whether there is an image with this provenance at `path`, by its first bytes alone."""
    try:
        with Image.open(path) as image:
            return image.info.get("provenance") == provenance
    except Exception:  # missing or broken; load_image says of which, if the image is wanted
        return False


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, or a copy on disks that have one name a file."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def cached_features(compute, images: np.ndarray, key: str) -> np.ndarray:
    """Return compute(images), from the cache if an earlier call with this key stored it for the same images.

    key: names all that decides the result but the images, in letters that a file name may have. A cache that cannot
    be read or written, or that does not hold what was written, is not used.
    """
    path = cache_folder() / "features" / f"{key}-{content_hash(images)}.npz"
    with suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile), \
            np.load(path, allow_pickle=False) as file:
        if str(file["content"]) == content_hash(file["features"]):
            return file["features"]
    features = compute(images)
    with suppress(UserError), whole_file(path, sync=False) as part, open(part, "wb") as file:
        np.savez(file, features=features, content=content_hash(features))
    return features


def content_hash(array: np.ndarray) -> str:
    """Return a hash of an array's type, shape and values, 32 hex digits."""
    array = np.ascontiguousarray(array)
    return hash_of_blocks([array], array.shape)


def hash_of_blocks(blocks: Iterable[np.ndarray], shape: Tuple[int, ...]) -> str:
    """Return the content_hash of an array of this shape, whose rows come in blocks, one of which is held at a time."""
    digest = None
    for block in blocks:
        digest = digest or hashlib.sha256(f"{block.dtype} {shape} ".encode())
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:32]


def set_aside(path: Path) -> str:
    """Rename a broken file to a free name beside it, and return words that say so. Raises UserError if that fails."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.broken{number if number > 1 else ''}")
        if not aside.exists():
            break
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return "renamed by another process"
    except OSError as error:
        raise UserError(f"{path} can neither be read nor renamed: {error.strerror or error}") from None
    return f"renamed to {aside.name}"


@contextmanager
def only_writer(path: Path):
    """Hold a lock on the record at `path` during the block, after removing half-written files of a killed writer.

    Raises UserError if another process holds the lock, on this machine or another one that shares the folder.
    """
    lock = filelock.FileLock(str(path.with_name(f".{path.stem}.lock")), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process is writing {path}; wait for it, or use another --results_dir") from None
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror or error}") from None
    try:
        for part in (*filter(_half_written(path), path.parent.glob(".*.part")),
                     *(path.parent / "images" / path.stem).rglob(".*.part")):
            part.unlink()
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # before the release, or it could be another process's
        lock.release()


def check_no_shard_is_written(path: Path) -> None:
    """Raise UserError if another process writes a shard of the record at `path`, whose images it needs."""
    for lock in path.parent.glob(f".{glob.escape(path.stem)}.*of*.lock"):
        try:
            with filelock.FileLock(str(lock), timeout=0):
                pass
        except filelock.Timeout:
            raise UserError(f"another process is writing the shard {path.parent / lock.name[1:-5]}.json of this "
                            "record; wait for it, or leave out --overwrite") from None


def _half_written(path: Path):
    """Return a test for parts of the record at `path`, of its figures and of the report, but not of other records."""
    name, stem = re.escape(path.name), re.escape(path.stem)
    pattern = re.compile(rf"\.({name}|{stem}(_\w+)?\.(?!json)\w+|report\.html|results\.csv)\.[0-9a-f]+\.part")
    return lambda part: pattern.fullmatch(part.name) is not None
