"""Captions and the images they were written for: drawn shapes, COCO, Flickr8k.

A data set is read into samples whose images are opened when they are needed.
One seeded order decides: samples are taken from its front, captions to train
on from its back, so both stay the same when the number of the other changes.
"""
from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import re
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pruning import UserError, cache_folder, check_name
from pruning.shapes import scenes

# The bucket of images.cocodataset.org under its provider's name: the host's own has no valid TLS certificate.
COCO_URL = "https://s3.amazonaws.com/images.cocodataset.org"
COCO_ARCHIVE = "annotations_trainval2017.zip"
COCO_ARCHIVE_HASH = "md5:f4bbac642086de4f52a3fdda2de5fa2c"
COCO_CAPTIONS = "annotations/captions_val2017.json"  # in the archive and in a data folder
COCO_IMAGES = "val2017"
RETRIES = 3
FLICKR8K_CAPTIONS = ("Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt", "captions.txt")
FLICKR8K_IMAGES = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")

# A plain file name: it cannot lead out of the image folder.
IMAGE_NAME = re.compile(r"(?!.*\.\.)[^/\\:\0]+\.(jpe?g|png)", re.IGNORECASE)


class Sample(NamedTuple):
    """A caption with its original; the id is the same in every run."""

    id: str
    caption: str
    open_image: Callable[[], Image.Image]  # RGB, in its own size
    repeat: int = 0  # with other noise: by the seed and so many more


RESIZE_RULE = "largest centred square, antialiased bicubic"  # of fit_image, for the record


class Source(NamedTuple):
    """A data set as read: all its samples, and what makes sure that the images of some of them are there."""

    samples: List[Sample]
    skipped: int = 0  # malformed captions
    provide: Callable[[List[Sample]], None] = lambda samples: None
    has: Callable[[Sample], bool] = lambda sample: True  # an image, or can provide it


# ---------------------------------------------------------------- files of captions

def _read_captions(path: Path, entries, expected: str) -> Tuple[dict, int]:
    """{image name: the caption of lowest order} from entries(path) = (name, order, caption), ...; and the skipped."""
    first, skipped = {}, 0
    try:
        for name, order, caption in entries(path):
            caption = " ".join(caption.split())
            if caption and IMAGE_NAME.fullmatch(name):
                first[name] = min(first.get(name, (order, caption)), (order, caption))
            else:
                skipped += 1
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError,
            csv.Error) as error:
        raise UserError(f"cannot read {path} ({str(error)[:200]}); expected {expected}") from error
    if not first:
        raise UserError(f"no captions in {path}; expected {expected}")
    return {name: caption for name, (_, caption) in first.items()}, skipped


def _coco_entries(path: Path):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
        coco = COCO(str(path))
    for annotation in coco.anns.values():
        image = coco.imgs.get(annotation["image_id"], {})
        yield image.get("file_name", ""), annotation["id"], annotation.get("caption", "")


def _token_entries(path: Path):
    """Lines of `name.jpg#0<TAB>caption`."""
    with open(path, encoding="utf-8-sig") as lines:
        for line in filter(str.strip, lines):
            match = re.fullmatch(r"([^\t]+)#(\d{1,9})\t(.*)", line.rstrip("\n"))
            name, order, caption = match.groups() if match else ("", 0, "")
            yield name, int(order), caption


def _csv_entries(path: Path):
    """Rows of `name.jpg,caption` under a header that says so."""
    with open(path, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines)
        if next(rows, None) != ["image", "caption"]:
            raise ValueError("its first line is not image,caption")
        for order, row in enumerate(filter(None, rows)):
            name, caption = row if len(row) == 2 else ("", "")
            yield name, order, caption


# ---------------------------------------------------------------- data sets

def _read_shapes(data_dir: Path | None) -> Source:
    if data_dir is not None:
        raise UserError("the shapes are drawn, not read from a folder: leave --data_dir out")
    return Source(_scene_samples("prompts"))


def _scene_samples(split: str) -> List[Sample]:
    indices = tqdm(range(scenes.SPLITS[split][0]), desc=f"{split} scenes", delay=1)
    drawn = [scenes.scene(split, index) for index in indices]
    return [Sample(f"{split}-{index:05d}", scene.caption, partial(scenes.render, scene))
            for index, scene in enumerate(drawn)]


def _read_coco(data_dir: Path | None) -> Source:
    folder = _fetch_coco_captions() if data_dir is None else data_dir
    path = _first_in(folder, "COCO captions", (COCO_CAPTIONS, "captions_val2017.json"))
    images = _first_in(folder, "COCO images", (COCO_IMAGES + "/",))
    captions, skipped = _read_captions(path, _coco_entries, "the JSON of COCO's captions_val2017.json")
    if data_dir is None:
        return Source(_file_samples(captions, images), skipped, partial(_fetch_coco_images, images))
    return _folder_source(captions, images, skipped)


def _read_flickr8k(data_dir: Path | None) -> Source:
    if data_dir is None:
        raise UserError("flickr8k cannot be fetched, its host is gone: unpack Flickr8k_Dataset.zip, Flickr8k_text.zip "
                        "(or Kaggle's adityajn105/flickr8k) into a folder and name it with --data_dir")
    path = _first_in(data_dir, "Flickr8k captions", FLICKR8K_CAPTIONS)
    images = _first_in(data_dir, "Flickr8k images", [name + "/" for name in FLICKR8K_IMAGES])
    if path.name == "captions.txt":
        captions, skipped = _read_captions(path, _csv_entries, "a header image,caption and rows such as 1.jpg,A dog .")
    else:
        captions, skipped = _read_captions(path, _token_entries, "lines such as 1.jpg#0<TAB>A dog .")
    return _folder_source(captions, images, skipped)


def _folder_source(captions: dict, images: Path, skipped: int) -> Source:
    return Source(_file_samples(captions, images), skipped, partial(_check_images, images),
                  lambda sample: (images / sample.id).is_file())


def _file_samples(captions: dict, images: Path) -> List[Sample]:
    return [Sample(name, caption, partial(open_rgb, images / name)) for name, caption in captions.items()]


def _first_in(folder: Path, what: str, names) -> Path:
    """The first of `names` that `folder` has; a name that ends in a slash is a folder."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}, where the {what} should be")
    for name in names:
        if (folder / name).is_dir() if name.endswith("/") else (folder / name).is_file():
            return folder / name
    raise UserError(f"no {what} in {folder}: expected {' or '.join(names)} there")


def _check_images(folder: Path, samples: List[Sample]) -> None:
    for sample in samples:
        if not (folder / sample.id).is_file():
            raise UserError(f"no image {folder / sample.id}, though it has a caption: put it there")


class Dataset(NamedTuple):
    """What the commands know of a data set without reading it."""

    help: str
    default_model: str
    backbones: str  # which networks the metrics use by default: "bundled" or "standard"
    read: Callable[[Path | None], Source]  # from a data folder, or None


STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DATASETS = {
    "shapes": Dataset("drawn scenes, nothing to fetch", "shapes-unet", "bundled", _read_shapes),
    "coco": Dataset("COCO val2017, fetched as needed", STABLE_DIFFUSION, "standard", _read_coco),
    "flickr8k": Dataset("Flickr8k, from a folder you have", STABLE_DIFFUSION, "standard", _read_flickr8k),
}


# ---------------------------------------------------------------- choosing

def load_samples(dataset: str, num_images: int, seed: int = 0, data_dir=None) -> Tuple[List[Sample], int]:
    """Choose `num_images` samples by `seed`, and say how many malformed captions were skipped.

    The same seed gives the same samples, and fewer images the first of them.
    Raises UserError if there are not that many, or their captions or image
    files are missing or cannot be fetched.
    """
    if num_images < 1:
        raise UserError(f"the number of images must be 1 or more, got {num_images}")
    source = _read(dataset, data_dir)
    if num_images > len(source.samples):
        raise UserError(f"{num_images} images asked for, {dataset} has {len(source.samples)}")
    samples = _seeded_order(source.samples, seed)[:num_images]
    source.provide(samples)
    return samples, source.skipped


def training_captions(dataset: str, count: int, seed: int = 0, data_dir=None, exclude=()) -> List[str]:
    """Up to `count` captions to train on, none of them the caption of a sample in `exclude`.

    Shapes: of the training split. Others: of the images that `load_samples`
    would choose last. Needs no image. Raises UserError if none is left.
    """
    held_out = {sample.caption for sample in exclude}
    if dataset == "shapes":
        indices = _permutation(scenes.SPLITS["train"][0], seed)[:count]
        captions = [scenes.scene("train", index).caption for index in indices]
    else:
        captions = [sample.caption for sample in reversed(_seeded_order(_read(dataset, data_dir).samples, seed))]
    captions = [caption for caption in captions if caption not in held_out][:count]
    if not captions:
        raise UserError(f"{dataset} has no caption left to train on: ask for fewer images")
    return captions


def reference_samples(dataset: str, samples: List[Sample]) -> List[Sample]:
    """The samples whose originals FID compares with: the reference scenes of shapes, else `samples` themselves."""
    return _scene_samples("reference") if dataset == "shapes" else samples


def other_samples(dataset: str, samples: List[Sample], seed: int = 0, data_dir=None) -> List[Sample]:
    """As many samples as `samples`, real images that reference_samples has none of; [] where there are not so many.

    Their distance to the reference is what images without a fault would have. Those of shapes are `samples`.
    """
    if dataset == "shapes":
        return samples
    source, chosen = _read(dataset, data_dir), {sample.id for sample in samples}
    left = (sample for sample in _seeded_order(source.samples, seed) if sample.id not in chosen and source.has(sample))
    others = list(itertools.islice(left, len(samples)))
    if len(others) < len(samples):
        return []
    source.provide(others)
    return others


def _read(dataset: str, data_dir) -> Source:
    check_name("dataset", dataset, DATASETS)
    return DATASETS[dataset].read(None if data_dir is None else Path(data_dir))


def _seeded_order(samples: List[Sample], seed: int) -> List[Sample]:
    samples = sorted(samples, key=lambda sample: sample.id)  # whatever their order in the file
    return [samples[index] for index in _permutation(len(samples), seed)]


def _permutation(count: int, seed: int) -> np.ndarray:
    try:
        return np.random.RandomState(seed).permutation(count)  # a stream that numpy's policy keeps as it is
    except ValueError as error:
        raise UserError(f"seed {seed}: {error}") from error


# ---------------------------------------------------------------- images

def open_rgb(path) -> Image.Image:
    """Open an image file upright (by its EXIF orientation) and as RGB; UserError if it is broken."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises what the broken bytes lead it to
        raise UserError(f"cannot read the image {path} ({error}): replace the file") from error


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, brought to size x size by antialiased bicubic resizing."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: ImageOps.fit would let what is outside the square into its edge.
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def load_originals(samples: List[Sample], size: int) -> np.ndarray:
    """The samples' originals as uint8 (n, size, size, 3), fitted by `fit_image`."""
    originals = np.empty((len(samples), size, size, 3), np.uint8)
    for sample, row in zip(tqdm(samples, desc="originals", delay=1), originals):
        row[:] = fit_image(sample.open_image(), size)
    return originals


# ---------------------------------------------------------------- fetching COCO

def _fetch_coco_captions() -> Path:
    """The cache folder, with the captions in it; it is laid out as a data folder is."""
    cache = cache_folder() / "coco"
    with _fetching("COCO's captions"):
        (cache / COCO_IMAGES).mkdir(parents=True, exist_ok=True)
        if not (cache / COCO_CAPTIONS).exists():
            # All in a folder of its own until it is whole, and the archive goes with that folder.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                with tqdm(total=252_907_541, desc=COCO_ARCHIVE, unit="B", unit_scale=True, leave=False) as bar:
                    archive = _fetch(Path(scratch), COCO_ARCHIVE, COCO_ARCHIVE_HASH, "annotations",
                                     _downloader(progressbar=bar))
                with zipfile.ZipFile(archive) as members:
                    captions = members.extract(COCO_CAPTIONS, scratch)
                (cache / COCO_CAPTIONS).parent.mkdir(exist_ok=True)
                os.replace(captions, cache / COCO_CAPTIONS)
    return cache


def _fetch_coco_images(folder: Path, samples: List[Sample]) -> None:
    """Fetch the samples' images that `folder` lacks, eight at a time."""
    download = _downloader()

    def download_whole(url, path, pooch):
        download(url, path, pooch)
        try:
            open_rgb(path)  # a server that names no length can cut an image unnoticed, or send a page instead
        except UserError as error:
            raise ValueError(f"{url} sent no whole image") from error  # which pooch retries

    with _fetching("COCO's images"), ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_fetch, folder, sample.id, None, COCO_IMAGES, download_whole) for sample in samples]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="COCO images", leave=False):
                job.result()
        finally:
            for job in jobs:  # after an error or Ctrl-C, start no more
                job.cancel()


def _downloader(**options):
    import pooch

    pooch.get_logger().setLevel("WARNING")  # no line a file: there is a bar
    return pooch.HTTPDownloader(timeout=30, chunk_size=2 ** 18, **options)


def _fetch(folder: Path, name: str, known_hash: str | None, part: str, download) -> str:
    """Fetch one file by `download`, with retries; it has its name in `folder` only once it is whole."""
    import pooch

    return pooch.create(folder, f"{_coco_url()}/{part}/", registry={name: known_hash},
                        retry_if_failed=RETRIES).fetch(name, downloader=download)


def _coco_url() -> str:
    return (os.environ.get("PRUNING_COCO_URL") or COCO_URL).rstrip("/")


@contextlib.contextmanager
def _fetching(what: str):
    try:
        yield
    except (OSError, ValueError) as error:  # those of requests are OSErrors, a wrong hash is a ValueError
        url = _coco_url()
        raise UserError(f"cannot fetch {what}: download {url}/annotations/{COCO_ARCHIVE} and {url}/zips/val2017.zip, "
                        f"unpack both into one folder and name it with --data_dir ({error})") from error
