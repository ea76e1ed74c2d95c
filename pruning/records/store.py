"""What a sweep keeps on disk while it runs: images, each with what made it, and a lock. No torch."""
from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Optional

import filelock
import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from pruning import UserError, cache_folder, whole_file


class Made(NamedTuple):
    """An image and how it came to be."""

    pixels: np.ndarray  # uint8 (h, w, 3)
    finite: bool  # whether the pipeline gave numbers for all of it
    seconds: float  # its share of the time of its batch


def made_by(**origin) -> str:
    """A hash of everything that decides an image's pixels, 32 hex digits."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_name(index: int) -> str:
    """What the image of the index-th sample of a point is called."""
    return f"{index:04d}.png"


def save(made: Made, path: Path, origin: str) -> None:
    """Write an image as PNG with its origin, whole or not at all. Raises UserError where that cannot be."""
    notes = PngImagePlugin.PngInfo()
    for name, value in (("made_by", origin), ("finite", str(int(made.finite))), ("seconds", repr(made.seconds))):
        notes.add_text(name, value)
    with whole_file(path, sync=False) as part:  # what a power cut leaves broken is found broken and made again
        Image.fromarray(made.pixels).save(part, format="PNG", pnginfo=notes, compress_level=1)


def load(path: Path, origin: str) -> Optional[Made]:
    """The image at `path` if it is there and was made by `origin`.

    One that cannot be read is set aside under another name, with a message.
    """
    try:
        with Image.open(path) as image:
            if image.info.get("made_by") != origin:
                return None
            seconds = float(image.info["seconds"])
            made = Made(np.asarray(image.convert("RGB")), image.info["finite"] == "1", seconds)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"its time is {seconds}")
            return made
    except FileNotFoundError:
        return None
    except Exception as error:  # Pillow raises what the broken bytes lead it to
        tqdm.write(f"{path} is no image that can be read ({error}): {set_aside(path)}, and it is made again")
        return None


def features(compute, images: np.ndarray, origin: dict) -> np.ndarray:
    """compute(images) of real images, as an earlier run with the same `origin` of what computes left it in the cache.

    Where the cache cannot be read or written it is computed each time.
    """
    content = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    path = cache_folder() / "features" / f"{made_by(**origin, shape=images.shape, content=content)}.npy"
    with suppress(OSError, ValueError, EOFError):
        return np.load(path, allow_pickle=False)
    found = compute(images)
    with suppress(UserError), whole_file(path, sync=False) as part, open(part, "wb") as file:
        np.save(file, found)
    return found


def set_aside(path: Path) -> str:
    """Rename a file that cannot be used to a free name beside it; words that say so. Raises UserError."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.broken{number if number > 1 else ''}")
        if not aside.exists():
            break
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return "set aside by another process"
    except OSError as error:
        raise UserError(f"cannot read {path}, nor set it aside: {error.strerror or error}") from None
    return f"set aside as {aside.name}"


@contextmanager
def only_writer(path: Path):
    """Hold a lock file beside `path` for the block; what a killed writer left half-written there is removed.

    Raises UserError where another process holds it, on this machine or another that shares the folder.
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
        for part in (*path.parent.glob(f".{path.stem}*.part"),
                     *(path.parent / "images" / path.stem).rglob(".*.part")):
            part.unlink()
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held, so that nobody else's is
        lock.release()
