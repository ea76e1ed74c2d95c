"""The original images of samples, read some at a time: their hash, and their features."""
from __future__ import annotations

import functools
import hashlib
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from pruning import UserError, data
from pruning.data import Sample
from pruning.data.faults import sentences
from pruning.metrics import backbones
from pruning.models import provenance
from pruning.progress import tqdm
from pruning.records import store

BLOCK = 64  # images in memory at a time
REFERENCE_ROWS = 256  # real images in memory at a time; a record's hash of them depends on it


def content_hash(samples: Sequence[Sample], size: int) -> str:
    """Return the hash of the samples' originals, as store.content_hash gives it of all together.

    describe() reads the same files again: a pass of its own, some 6 ms an image, finds broken files and changed
    originals before networks describe thousands of images.
    Raises UserError that counts those that cannot be read.
    """
    starts, broken = tqdm(range(0, max(1, len(samples)), BLOCK), desc="originals", delay=2, leave=False), {}
    blocks = (data.load_originals(samples[start:start + BLOCK], size, broken) for start in starts)
    found = store.hash_of_blocks(blocks, (len(samples), size, size, 3))
    if broken:
        raise UserError(" ".join([*sentences(broken), "Replace them"]))
    return found


def describe(networks: Dict[str, Any], described, versions, device: str, size: int, samples: Sequence[Sample]
             ) -> Tuple[Dict[str, np.ndarray], str]:
    """Return the features (n, d) of the samples' originals by each network, and a hash of the originals' pixels.

    The originals are read some at a time, and features come from the cache if they are there. Without samples there are
    no features, and the hash is "none".
    """
    if not samples:
        return {}, "none"
    keys = {family: provenance.provenance_hash(backbone=described[family], versions=versions, device=device,
                                               code=provenance.source_hash(backbones)) for family in networks}
    rows: Dict[str, List[np.ndarray]] = {family: [] for family in networks}
    pixels = hashlib.sha256()
    for start in tqdm(range(0, len(samples), REFERENCE_ROWS), desc="real images", delay=2, leave=False):
        originals = data.load_originals(samples[start:start + REFERENCE_ROWS], size)
        pixels.update(store.content_hash(originals).encode())
        for family, network in networks.items():
            rows[family].append(store.cached_features(functools.partial(backbones.describe, family, network),
                                                      originals, keys[family]))
    return {family: np.concatenate(each) for family, each in rows.items()}, pixels.hexdigest()[:32]
