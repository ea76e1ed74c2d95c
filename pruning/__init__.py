"""Pruning Analysis for Diffusion Models: how far can a text-to-image model be pruned?"""
from __future__ import annotations

import difflib
import os
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")  # variables that forbid the network


class UserError(Exception):
    """Something the user can put right; the commands print it as one line and exit with 2."""


def cache_folder() -> Path:
    """Where data is fetched to, and what was computed from it is kept: $PRUNING_CACHE, or a folder in the home."""
    return Path(os.environ.get("PRUNING_CACHE") or Path.home() / ".cache" / "pruning_analysis")


def offline_by() -> str:
    """Return the first variable of OFFLINE that is set to forbid the network, as NAME=value, or "" if none is."""
    said = (f"{name}={os.environ.get(name, '')}" for name in OFFLINE)
    return next((text for text in said if text.split("=")[1].upper() in ("1", "ON", "YES", "TRUE")), "")


def check_online(what: str) -> None:
    """Raise UserError if a variable of OFFLINE forbids to fetch `what`, which names where it is and where it goes."""
    if offline_by():
        raise UserError(f"cannot fetch {what}: {offline_by()} forbids the network; unset that variable, or bring the "
                        "file there yourself")


def check_name(what: str, name: str, names) -> str:
    """Return `name` if it is one of `names`; else raise a UserError that suggests the nearest."""
    if name in names:
        return name
    near = [known for known in names if name and known.startswith(name)] or difflib.get_close_matches(name, list(names))
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown {what} {name!r}{hint} (one of: {', '.join(names)})")


@contextmanager
def whole_file(path, sync: bool = True):
    """Yield a path beside `path` to write to, which takes its place when the block ends well; else it is removed.

    sync: wait until it is on the disk, so that not even a power cut leaves half of it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")  # also unique among machines
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if sync:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()
