"""The steps of a point: prune, make images, time, measure. pruning_analysis.run_pruning_experiment composes them."""
from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from pruning import UserError, distributed, methods
from pruning.baselines import baseline_plan, drawing
from pruning.experiment import Experiment, release
from pruning.metrics import METRICS, backbones, costs
from pruning.models import compiling, generation, pipelines, provenance, saving
from pruning.originals import BLOCK
from pruning.progress import tqdm
from pruning.records import store
from pruning.records.record import Point, Record


class Images(NamedTuple):
    """What is known about the images of a point, which lie on disk."""

    finite: np.ndarray  # bool (n,): False if the pipeline gave NaN or infinity
    seconds_each: float  # mean of their batches' wall time, divided by the images of the batch
    calls: int  # of the denoiser, for a batch


@contextmanager
def add_seconds(stage: str, seconds: Dict[str, float]):
    """Add the wall time of the block to seconds[stage]."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


def prune_copy(experiment: Experiment, rate: float):
    """Prune a copy of the dense denoiser and put it into the pipeline. Returns the copy and what the method reports.

    Of a baseline, the copy stays dense, and the report is its plan. All processes call this together.
    """
    method, options = experiment.record.method, experiment.record.options
    baseline = baseline_plan(experiment, rate) if method in methods.BASELINES else None
    release(experiment.pipeline, experiment.dense, experiment.offload)
    pipelines.set_denoiser(experiment.pipeline, experiment.dense)  # lets go of the copy of the last rate
    calibrates = bool(rate and not baseline and methods.needs(method, options))
    denoiser = copy_to_prune(experiment, calibrates)
    if baseline:
        pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
        return denoiser, baseline
    if calibrates:
        methods.calibrate(method, denoiser, experiment.calibration, **options)
    pruned = methods.prune(method, denoiser, rate, calibration=experiment.calibration, **options)
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    return denoiser, pruned


def count_costs(experiment: Experiment, denoiser, rate: float) -> Dict[str, Any]:
    """Return the parameters, bytes, multiply-accumulates and memory of the denoiser in the pipeline.

    For the dense denoiser, also each layer's share. The first calls warm the device up for the timing that follows.
    """
    _ = experiment.batch_call
    called = experiment.call_costs(tensor_shapes(denoiser))
    shares = costs.layer_shares(denoiser, experiment.single_call) if rate == 0 else {}
    with holding_values(experiment, denoiser):
        return {**costs.count_parameters(denoiser), "file_bytes": saving.file_bytes(denoiser), **called, **shares}


def tensor_shapes(denoiser) -> tuple:
    """Return the shapes of a denoiser's tensors. Denoisers of equal shapes do equal work."""
    return tuple(tensor.shape for tensor in denoiser.state_dict().values())


def copy_to_prune(experiment: Experiment, calibrates: bool):
    """Return a copy of the dense denoiser where methods work on it.

    That is the device, which even with whole models offloaded has room for the denoiser, or with sequential offloading
    the CPU. calibrates: the dense denoiser's calls are recorded first, so that the device need not hold both.
    """
    if calibrates:
        _ = experiment.calibration.calls
    return pipelines.copy_to(experiment.dense, "cpu" if experiment.offload == "sequential" else experiment.device)


@contextmanager
def holding_values(experiment: Experiment, denoiser):
    """Have the tensors of the denoiser in the pipeline hold their values, which are apart in sequential offloading."""
    apart = experiment.offload == "sequential"
    if apart:
        release(experiment.pipeline, denoiser, experiment.offload)
    yield
    if apart:
        pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)


def compile_denoisers(experiment: Experiment, denoiser) -> Optional[compiling.CompiledCalls]:
    """If asked for, compile the pruned and the dense denoiser for every batch size; None if not asked for."""
    if not experiment.record.settings["compile"]:
        return None
    compiling.forget_compiled()
    compiling.compile_denoiser(experiment.dense)
    calls = compiling.compile_denoiser(denoiser)
    for size in {len(batch) for batch in experiment.batches}:  # each size is compiled apart
        observe_step(experiment, calls, size)
    return calls


def observe_step(experiment: Experiment, calls: compiling.CompiledCalls, size: int) -> None:
    """Make `size` images in one step, and note in `calls` how much of the denoiser ran compiled."""
    calls.observe(lambda: generation.one_step(experiment.pipeline, experiment.samples[:size], **experiment.sampling))


def make_images(experiment: Experiment, rate: float, on_batch: Optional[Callable[[int, float], None]] = None) -> Images:
    """Make the images of a point that are not on disk yet. Each batch is written while the next one is drawn.

    Several processes share out the batches. Returns what is known about all images. Raises UserError if images can
    neither be made nor written; what was drawn before is written all the same.
    """
    batches, found = experiment.batches, {}

    def draw():
        for number in range(distributed.rank, len(batches), distributed.world_size):
            batch = batches[number]
            images = [load_image(experiment, rate, index) for index in batch]
            if None in images:
                with drawing(experiment, rate) as sampling:
                    made = generation.generate(experiment.pipeline, [experiment.samples[index] for index in batch],
                                               **sampling)
                images = [store.Made(pixels, bool(finite), made.seconds_each, made.calls)
                          for pixels, finite in zip(made.pixels, made.finite)]
                yield batch, images
            found.update((index, without_pixels(image)) for index, image in zip(batch, images))
            if on_batch:
                on_batch(sum(map(len, batches[number:number + distributed.world_size])), images[0].seconds)

    def write(drawn):
        for index, image in zip(*drawn):
            store.save_image(image, image_file(experiment, rate, index), image_provenance(experiment, rate, index))

    use_beside(draw(), write)
    return known_images(found)


def use_beside(items: Iterable, use: Callable[[Any], None]) -> None:
    """Call use(item) for each item in a thread, while the next item is made; one waits at most.

    An error of `use` is raised here when the next item is there. Whatever ends the loop, the thread finishes its item.
    """
    with ThreadPoolExecutor(1) as worker:
        running = None
        for item in items:
            if running:
                running.result()
            running = worker.submit(use, item)
        if running:
            running.result()


def made_ahead(items: Iterator) -> Iterator:
    """Yield the items, none of which is None. A thread makes each while the one before it is used."""
    with ThreadPoolExecutor(1) as worker:
        item = next(items, None)
        while item is not None:
            coming = worker.submit(next, items, None)
            yield item
            item = coming.result()


def load_images(experiment: Experiment, rate: float) -> Optional[Images]:
    """Return what is known about the images of a point, or None if one is missing or was made in another way.

    Several processes share out the reading.
    """
    return known_images({index: without_pixels(load_image(experiment, rate, index))
                         for batch in experiment.batches[distributed.rank::distributed.world_size] for index in batch})


def without_pixels(image: Optional[store.Made]) -> Optional[store.Made]:
    """Return an image without its pixels, so that they can be let go."""
    return image and image._replace(pixels=None)


def known_images(found: Dict[int, Optional[store.Made]]) -> Optional[Images]:
    """Return what is known about the images that all processes have found, or None if one is missing."""
    everything = dict(distributed.gather(list(found.items())))
    if None in everything.values():
        return None
    _, finite, seconds, calls = zip(*(everything[index] for index in sorted(everything)))
    return Images(np.array(finite), float(np.mean(seconds)), max(calls))


def image_blocks(experiment: Experiment, rate: float, rows: Sequence[int], dense_rows: Sequence[int]
                 ) -> Iterator[Tuple[Sequence[int], np.ndarray, np.ndarray]]:
    """Yield (positions, images of a point, dense model's images to compare with), BLOCK of them at a time.

    rows: the positions of the samples. dense_rows: for each of them, that of the dense model's image. Images are uint8
    (n, size, size, 3). Raises UserError if one is not on disk.
    """
    for start in tqdm(range(0, len(rows), BLOCK), desc="metrics", delay=2, leave=False):
        own, other = rows[start:start + BLOCK], dense_rows[start:start + BLOCK]
        pixels = read_pixels(experiment, rate, own)
        yield own, pixels, pixels if rate == 0 and own == other else read_pixels(experiment, 0.0, other)


def measure_images(
        experiment: Experiment, measurements: Callable, names: Sequence[str], rate: float, rows: Sequence[int],
        dense_rows: Sequence[int]) -> Tuple[Dict[str, np.ndarray], Dict[str, np.ndarray]]:
    """Return {metric: the value of each image} and {family of backbones: features (n, d)} of images in blocks.

    measurements: as in run_pruning_experiment. names: of metrics. The features are those that metrics of the whole set
    need. rows, dense_rows: as in image_blocks. Each process measures the images of its own batches. The main process
    returns what all have found, in the order of `rows`, the others nothing.
    """
    per_image = [name for name in names if METRICS[name].per_image]
    families = {METRICS[name].backbone: None for name in names if name not in per_image and METRICS[name].backbone}
    shared = [row // experiment.sampling["batch_size"] % distributed.world_size for row in rows]
    own = [place for place, process in enumerate(shared) if process == distributed.rank]

    def measure(block):
        described = functools.lru_cache(None)(functools.partial(describe, experiment, block[1]))
        found = measurements(described, *block)
        return {name: found[name]() for name in per_image}, {family: described(family) for family in families}

    blocks = image_blocks(experiment, rate, [rows[place] for place in own], [dense_rows[place] for place in own])
    found = distributed.collect([measure(block) for block in made_ahead(blocks)] if per_image or families else [])
    order = np.argsort(np.argsort(shared, kind="stable"))  # they come process after process

    def joined(numbers):
        return {name: np.concatenate([each[name] for each in numbers])[order] for name in numbers[0]} if numbers else {}

    return joined([values for values, _ in found]), joined([features for _, features in found])


def describe(experiment: Experiment, pixels: np.ndarray, family: str) -> np.ndarray:
    """Return the features (n, d) of some images by a network of the experiment."""
    return backbones.describe(family, experiment.networks[family], pixels)


def read_pixels(experiment: Experiment, rate: float, rows: Sequence[int]) -> np.ndarray:
    """Return the images of a point at these positions from disk. Raises UserError if one is missing."""
    found = [load_image(experiment, rate, row) for row in rows]
    if None in found:
        raise UserError(f"images in {image_file(experiment, rate, 0).parent} vanished: give the same command again")
    return np.stack([image.pixels for image in found])


def load_image(experiment: Experiment, rate: float, index: int) -> Optional[store.Made]:
    """Return an image of a point from disk, or None if it is missing or was made in another way."""
    return store.load_image(image_file(experiment, rate, index), image_provenance(experiment, rate, index))


def image_file(experiment: Experiment, rate: float, index: int) -> Path:
    """Return the file of an image of a point."""
    return store.image_file(experiment.images_folder, experiment.record.variant, rate, index)


def image_provenance(experiment: Experiment, rate: float, index: int) -> str:
    """Return the hash of all that decides the pixels of an image."""
    settings, versions, sample = experiment.record.settings, experiment.record.versions, experiment.samples[index]
    sampled = {name: settings[name] for name in (
        "steps", "guidance_scale", "image_size", "dtype", "compile", "offload", "device", "pipeline", "configs",
        "denoiser")}
    packages = {name: versions[name] for name in ("torch", "diffusers", "transformers")}
    return provenance.provenance_hash(
        **sampled, **packages, pruned=pruned_origin(experiment.record, rate) if rate else {}, sample=sample.id,
        caption=sample.caption, noise=settings["seed"] + sample.repeat)


def pruned_origin(record: Record, rate: float) -> Dict[str, Any]:
    """Return all that decides the weights of a pruned model."""
    seed = {"seed": record.settings["seed"]} if methods.needs(record.method, record.options) else {}
    return {"model": record.model, "denoiser": record.settings["denoiser"], "method": record.method, "rate": rate,
            **record.options, **seed}


def time_calls(experiment: Experiment, denoiser, rate: float, images: Images) -> Dict[str, Any]:
    """Return the seconds of a denoiser call and of an image, each beside the dense model's, with intervals of ratios.

    Calls of the pruned and the dense denoiser alternate. The dense model's image time is computed: the image time of
    the pruned model, with the dense call time in place of its own. Dense images made at another moment would compare
    how busy the machine was. A baseline has other calls in a drawing: the time of one is here that of all its calls,
    divided by the number of dense's.
    """
    image = images.seconds_each
    if rate == 0:
        seconds, = costs.denoiser_seconds([denoiser], experiment.batch_call)
        return {"denoiser_seconds": seconds, "dense_denoiser_seconds": seconds, "image_seconds": image,
                "dense_image_seconds": image, "ratio_intervals": {}}
    calls, limit = images.calls, costs.TIMING * image * len(experiment.samples)
    if experiment.record.method in methods.BASELINES:
        calls = load_image(experiment, 0.0, 0).calls  # of dense; a baseline may make fewer
        dense_seconds, ratio, ends = time_beside_dense(experiment, denoiser, *methods.file_of(
            experiment.record.method).timed(denoiser, baseline_plan(experiment, rate), images.calls / calls), limit)
    else:
        # Zeros are multiplied like other weights, so of rates that leave the shapes as they are the first is timed.
        shapes = tensor_shapes(denoiser)
        if shapes not in experiment.timed:
            experiment.timed[shapes] = time_beside_dense(experiment, denoiser, [denoiser], [1.0], limit)
        dense_seconds, ratio, ends = experiment.timed[shapes]
    in_calls = min(1.0, calls * dense_seconds * ratio / len(experiment.batches[0]) / image)  # share of the time

    def image_ratio(call_ratio: float) -> float:
        return 1 / (1 - in_calls + in_calls / call_ratio)

    return {"denoiser_seconds": dense_seconds * ratio, "dense_denoiser_seconds": dense_seconds,
            "image_seconds": image, "dense_image_seconds": image / image_ratio(ratio),
            "ratio_intervals": {"denoiser_seconds": list(ends), "image_seconds": [image_ratio(end) for end in ends]}}


def time_beside_dense(experiment: Experiment, denoiser, others: List[Any], shares: Sequence[float], limit: float
                      ) -> Tuple[float, float, Tuple[float, float]]:
    """Return costs.time_ratio of others beside dense: all on the device, or in turns if it cannot hold them.

    others: the pruned denoiser, or of a baseline, denoisers that share the tensors of `denoiser`. limit: time_ratio's.
    """
    import torch  # here, because the commands import this file before they need torch

    pipeline, dense, device, offload = experiment.pipeline, experiment.dense, experiment.device, experiment.offload
    ratio = functools.partial(costs.time_ratio, dense, others, experiment.batch_call, shares=shares, limit=limit)
    if offload == "sequential":
        found = ratio(lambda each: pipelines.set_denoiser(pipeline, each, device, offload))
        release(pipeline, dense, offload)
    else:
        if offload:
            pipeline.remove_all_hooks()
        try:
            with pipelines.lent_to(dense, device), pipelines.lent_to(denoiser, device):
                found = ratio()
        except torch.cuda.OutOfMemoryError:
            found = None
        if found is None:  # outside the handler, which holds the tensors of the failed call
            tqdm.write("no GPU memory for the dense and the pruned denoiser at once: they are timed in turns")
            denoiser.to("cpu")
            torch.cuda.empty_cache()
            with ExitStack() as turn:
                def place(each):
                    turn.close()  # brings the other back
                    turn.enter_context(pipelines.lent_to(each, device))
                found = ratio(place)
    pipelines.set_denoiser(pipeline, denoiser, device, offload)
    return found


def save_pruned(experiment: Experiment, denoiser, folder: Path, point: Point) -> None:
    """Save the pipeline with the pruned denoiser as a folder, with what was measured. Raises UserError if it cannot."""
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    if experiment.offload:
        release(experiment.pipeline, denoiser, experiment.offload)  # hooks would be in the way
    sampling = {name: experiment.sampling[name] for name in ("steps", "guidance_scale", "image_size")}
    measured = {name: value for name, value in asdict(point).items() if name not in ("per_image", "seconds")}
    saving.save(experiment.pipeline, pipelines.denoiser_name(experiment.pipeline), folder, sampling,
                pruned_origin(experiment.record, point.rate), measured, experiment.single_call)
