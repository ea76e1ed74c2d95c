"""Files that are fetched when they are first needed, each completely or not at all."""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Optional

from pruning import UserError, offline_by

RETRIES = 3


def downloader(**options):
    """Return what downloads a file for `fetch`. options: of pooch.HTTPDownloader."""
    import pooch

    return pooch.HTTPDownloader(timeout=30, chunk_size=2 ** 18, **options)


def fetch(url: str, folder, name: str, known_hash: Optional[str], download) -> str:
    """Fetch the file `name` at `url` unless `folder` has it, with retries. Return its path.

    The file gets its name only when it is complete. Raises OSError or ValueError.
    """
    import pooch

    if offline_by() and not (Path(folder) / name).exists():
        raise OSError(f"{offline_by()} forbids the network")
    pooch.get_logger().setLevel("WARNING")  # before pooch's first line: its logger remembers what it let through
    return pooch.create(folder, f"{url}/", registry={name: known_hash},
                        retry_if_failed=RETRIES).fetch(name, downloader=download)


@contextlib.contextmanager
def fetching(what: str, remedy: str):
    """Turn errors of fetching `what` into a UserError with the remedy, which says how to do it by hand."""
    try:
        yield
    except (OSError, ValueError) as error:  # requests raises OSErrors, pooch a ValueError for a wrong hash
        raise UserError(f"cannot fetch {what}: {remedy} ({error})") from error
