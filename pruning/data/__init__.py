"""Data sets: captions with the images that they describe.

A data set is one entry in DATASETS and one function `read(data_dir) -> Source` in a file of its own. The functions
below choose among its samples. They take one order of all samples, which depends on the seed: measured samples come
from its front and training captions from its back, so neither changes with the number of the other.
"""
from __future__ import annotations

from pathlib import Path
from typing import List, Tuple

from pruning import UserError, check_name
from pruning.data import coco, flickr8k, folders, prompts, shapes
from pruning.data.faults import Faults, note, sentences
from pruning.data.images import RESIZE_RULE, fit_image, load_originals, open_rgb
from pruning.data.samples import Dataset, Sample, Source, permutation

__all__ = ["DATASETS", "RESIZE_RULE", "Dataset", "Sample", "Source", "fit_image", "load_originals", "load_samples",
           "open_rgb", "other_samples", "reference_samples", "training_captions"]

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DATASETS = {
    "shapes": Dataset("drawn scenes, nothing to fetch", "shapes-unet", "bundled", shapes.read),
    "coco": Dataset("COCO val2017, fetched as needed", STABLE_DIFFUSION, "standard", coco.read),
    "flickr8k": Dataset("Flickr8k, from a folder that you have", STABLE_DIFFUSION, "standard", flickr8k.read),
    "folder": Dataset("images with captions.txt or a Hugging Face metadata.jsonl, from a folder that you have",
                      STABLE_DIFFUSION, "standard", folders.read),
    "prompts": Dataset("prompts without originals, from a .txt, .csv, .tsv or .jsonl file that you have",
                       STABLE_DIFFUSION, "standard", prompts.read, originals=False),
    "parti": Dataset("PartiPrompts, without originals, fetched as needed", STABLE_DIFFUSION, "standard",
                     prompts.read_parti, originals=False),
}


def load_samples(dataset: str, num_images: int, seed: int = 0, data_dir=None) -> Tuple[List[Sample], Faults]:
    """Return `num_images` samples chosen by `seed`, and what was skipped while the data set was read.

    A smaller number of images gives the first samples of a larger one.
    Raises UserError if the data set has fewer samples, or if its captions or the images of the chosen samples are
    missing, malformed or cannot be fetched.
    """
    if num_images < 1:
        raise UserError(f"the number of images must be 1 or more, got {num_images}")
    source = _read(dataset, data_dir)
    if num_images > len(source.samples):
        raise UserError(" ".join([f"{num_images} images asked for, but {dataset} has {len(source.samples)}.",
                                  *sentences(source.faults)]))
    samples = _seeded_order(source.samples, seed)[:num_images]
    source.provide(samples)
    return samples, source.faults


def training_captions(dataset: str, count: int, seed: int = 0, data_dir=None, exclude=()) -> List[str]:
    """Return `count` captions for training; none of them is the caption of a sample in `exclude`.

    The captions are those of the samples that `load_samples` would choose last, unless the data set has a training
    split of its own. No image is needed. Raises UserError if fewer captions are left.
    """
    source, excluded = _read(dataset, data_dir), {sample.caption for sample in exclude}
    if source.training is not None:
        captions = source.training(count + len(excluded), seed)
    else:
        captions = [sample.caption for sample in reversed(_seeded_order(source.samples, seed))]
    captions = [caption for caption in captions if caption not in excluded][:count]
    if len(captions) < count:
        left = f"only {len(captions)} captions" if captions else "no caption"
        fewer = f"give --calibration_images {len(captions)} or " if captions else ""
        raise UserError(f"{dataset} has {left} left to calibrate on and needs {count - len(captions)} more: "
                        f"{fewer}measure fewer images{', or add captions' if data_dir else ''}")
    return captions


def reference_samples(dataset: str, samples: List[Sample], data_dir=None) -> List[Sample]:
    """Return the samples whose originals are the reference set of FID and similar distances.

    The reference set is `samples` unless the data set has a reference split of its own.
    """
    source = _read(dataset, data_dir)
    return samples if source.reference is None else source.reference()


def other_samples(dataset: str, samples: List[Sample], seed: int = 0, data_dir=None) -> Tuple[List[Sample], Faults]:
    """Return as many samples as `samples` whose originals are not in the reference set, or [] if there are too few.

    Also returns which samples were left out because they have no image.

    The distance of these real images to the reference set is the best that generated images can be expected to reach.
    If the data set has a reference split of its own, `samples` themselves are returned.
    """
    source = _read(dataset, data_dir)
    if source.reference is not None:
        return samples, {}
    chosen = {sample.id for sample in samples}
    others: List[Sample] = []
    faults: Faults = {}
    for sample in _seeded_order(source.samples, seed):
        if len(others) == len(samples):
            break
        if sample.id in chosen:
            continue
        if source.has(sample):
            others.append(sample)
        else:
            note(faults, "Images left out of the floors, which other real images give, because they have no file",
                 sample.id)
    if len(others) < len(samples):
        return [], faults
    source.provide(others)
    return others, faults


def _read(dataset: str, data_dir) -> Source:
    check_name("dataset", dataset, DATASETS)
    return DATASETS[dataset].read(None if data_dir is None else Path(data_dir))


def _seeded_order(samples: List[Sample], seed: int) -> List[Sample]:
    samples = sorted(samples, key=lambda sample: sample.id)  # independent of the order in a caption file
    return [samples[index] for index in permutation(len(samples), seed)]
