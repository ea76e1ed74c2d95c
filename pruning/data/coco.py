"""COCO val2017, from a folder or fetched as needed."""
from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from pruning import UserError, cache_folder
from pruning.data.faults import Faults, note
from pruning.data.fetching import downloader, fetch, fetching
from pruning.data.folders import Entry, file_samples, first_in, folder_source, read_captions
from pruning.data.images import open_rgb
from pruning.data.samples import Sample, Source
from pruning.progress import tqdm

# The S3 bucket of images.cocodataset.org; that host itself has no valid TLS certificate.
URL = "https://s3.amazonaws.com/images.cocodataset.org"
ARCHIVE = "annotations_trainval2017.zip"
ARCHIVE_HASH = "md5:f4bbac642086de4f52a3fdda2de5fa2c"
ARCHIVE_BYTES = 252_907_541
CAPTIONS = "annotations/captions_val2017.json"  # in the archive and in a data folder
IMAGES = "val2017"


def read(data_dir: Optional[Path]) -> Source:
    """Return the samples of COCO val2017; each image has its caption of lowest annotation id.

    Without a data folder, the captions are fetched into the cache, and `Source.provide` fetches the images.
    Raises UserError if the captions cannot be fetched, or if the captions or the image folder are missing or malformed.
    """
    folder = _fetch_captions() if data_dir is None else data_dir
    path = first_in(folder, "COCO captions", (CAPTIONS, "captions_val2017.json"))
    images = first_in(folder, "COCO images", (IMAGES + "/",))
    captions, faults = read_captions(path, _entries, "the JSON of COCO's captions_val2017.json")
    if data_dir is None:
        return Source(file_samples(captions, images), faults, partial(_fetch_images, images))
    return folder_source(captions, images, faults)


def _entries(path: Path, faults: Faults) -> Iterator[Entry]:
    """Yield (where, image name, annotation id, caption) for each caption whose image is known.

    pycocotools indexes what is sound: of several images, or annotations, that share an id it keeps one without a word,
    and it stops at a field of a wrong type.
    """
    from pycocotools.coco import COCO

    content = json.loads(path.read_bytes(), object_pairs_hook=_fields)
    images = list(_sound(content["images"], "images", faults, id=(int, str), file_name=(str,)))
    coco = COCO()
    coco.dataset = {"images": [image for _, image in images]}
    with contextlib.redirect_stdout(None):  # COCO prints how long the index took
        coco.createIndex()
    several = {image["id"] for _, image in images if image["file_name"] != coco.imgs[image["id"]]["file_name"]}
    for where, caption in _sound(content["annotations"], "annotations", faults,
                                 id=(int,), image_id=(int, str), caption=(str,)):
        image = coco.imgs.get(caption["image_id"])
        if image and caption["image_id"] not in several:
            yield where, image["file_name"], caption["id"], caption["caption"]
        else:
            listed = "several images" if image else "no image"
            note(faults, f"Captions skipped because their image_id stands for {listed}",
                 f"{where}: image_id {caption['image_id']}")


def _sound(entries: list, part: str, faults: Faults, **kinds: tuple) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield (where, entry) of the entries whose fields have these types, and note the others. A bool is no int."""
    *first, last = kinds
    for number, entry in enumerate(entries):
        where = f"{part}[{number}]"
        if isinstance(entry, dict) and all(type(entry.get(name)) in types for name, types in kinds.items()):
            yield where, entry
        else:
            what, fields = "Images" if part == "images" else "Captions", f"{', '.join(first)} or {last}"
            note(faults, f"{what} skipped because their {fields} is missing or of a wrong type", where)


def _fields(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"an object has one of its fields twice: {', '.join(name for name, _ in pairs)}")
    return fields


# ---------------------------------------------------------------- fetching

def _fetch_captions() -> Path:
    """Fetch the captions unless the cache has them. Return the cache folder, whose layout is that of a data folder."""
    cache = cache_folder() / "coco"
    with _fetching("COCO's captions"):
        (cache / IMAGES).mkdir(parents=True, exist_ok=True)
        if not (cache / CAPTIONS).exists():
            # The archive and a half-written file of captions lie in a scratch folder, so that no failure leaves them.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                with tqdm(total=ARCHIVE_BYTES, desc=ARCHIVE, unit="B", unit_scale=True, leave=False) as bar:
                    archive = fetch(f"{_url()}/annotations", scratch, ARCHIVE, ARCHIVE_HASH,
                                    downloader(progressbar=bar))
                with zipfile.ZipFile(archive) as members:
                    captions = members.extract(CAPTIONS, scratch)
                (cache / CAPTIONS).parent.mkdir(exist_ok=True)
                os.replace(captions, cache / CAPTIONS)
    return cache


def _fetch_images(folder: Path, samples: List[Sample]) -> None:
    """Fetch the images of `samples` that `folder` lacks, eight at a time."""
    download = downloader()

    def download_whole(url, path, pooch):
        download(url, path, pooch)
        try:
            open_rgb(path)  # a server may cut an image short without an error, or send an HTML page instead
        except UserError as error:
            raise ValueError(f"{url} sent no complete image") from error  # pooch retries after a ValueError

    with _fetching("COCO's images"), ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fetch, f"{_url()}/{IMAGES}", folder, sample.id, None, download_whole) for sample in samples]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="COCO images", leave=False):
                job.result()
        finally:
            for job in jobs:  # start no further downloads after an error or Ctrl-C
                job.cancel()


def _url() -> str:
    return (os.environ.get("PRUNING_COCO_URL") or URL).rstrip("/")


def _fetching(what: str):
    """Turn errors of fetching `what` into a UserError that explains how to download COCO by hand."""
    return fetching(what, f"download {_url()}/annotations/{ARCHIVE} and {_url()}/zips/val2017.zip, unpack both into "
                          "one folder and give it as --data_dir")
