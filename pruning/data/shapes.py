"""The shapes: scenes that are drawn by code, so that nothing is fetched or read."""
from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import List, Optional, Tuple

from pruning import UserError
from pruning.data.samples import Sample, Source, permutation
from pruning.progress import tqdm
from pruning.shapes import scenes


def read(data_dir: Optional[Path]) -> Source:
    """Return the scenes of the prompts split; training captions and reference images come from splits of their own.

    Raises UserError if a data folder is given.
    """
    if data_dir is not None:
        raise UserError("the shapes are drawn, not read from a folder: leave out --data_dir")
    return Source(_split_samples("prompts"), training=_training_captions,
                  reference=partial(_split_samples, "reference"))


def _split_samples(split: str) -> List[Sample]:
    return [Sample(f"{split}-{index:05d}", scene.caption, partial(scenes.render, scene))
            for index, scene in enumerate(_split_scenes(split))]


@lru_cache(maxsize=None)  # a run reads the shapes several times
def _split_scenes(split: str) -> Tuple[scenes.Scene, ...]:
    indices = tqdm(range(scenes.SPLITS[split][0]), desc=f"{split} scenes", delay=1)
    return tuple(scenes.scene(split, index) for index in indices)


def _training_captions(count: int, seed: int) -> List[str]:
    indices = permutation(scenes.SPLITS["train"][0], seed)[:count]
    return [scenes.scene("train", index).caption for index in indices]
