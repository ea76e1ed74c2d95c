"""The steps that make a point: prune, make images, time. pruning_analysis.run_pruning_experiment composes them."""
from __future__ import annotations

import copy
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np

from pruning import UserError, distributed, methods
from pruning.experiment import Experiment, release_dense
from pruning.methods import Pruned
from pruning.metrics import costs
from pruning.models import compiling, generation, pipelines, provenance, saving
from pruning.records import store
from pruning.records.record import Point, Record


@contextmanager
def add_seconds(stage: str, seconds: Dict[str, float]):
    """Add the wall time of the block to seconds[stage]."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


def prune_copy(experiment: Experiment, rate: float):
    """Prune a copy of the dense denoiser and put it into the pipeline. Returns the copy and what the method reports.

    All processes calibrate together. Training may end differently in each process, so the main process prunes for all.
    Then the report is None in the others.
    """
    method, options = experiment.record.method, experiment.record.options
    calibrates = bool(rate and methods.needs(method, options))
    denoiser = copy.deepcopy(experiment.dense).to("cpu" if experiment.offload else experiment.device)
    pruned: Optional[Pruned] = None
    if calibrates:
        methods.calibrate(method, denoiser, experiment.calibration, **options)
    if distributed.is_main or not calibrates:
        pruned = methods.prune(method, denoiser, rate, calibration=experiment.calibration, **options)
    if calibrates:
        removals = distributed.broadcast(getattr(denoiser, "removals", []))
        if not distributed.is_main:
            from pruning.methods import surgery  # here, because the commands import this file before they need torch
            for plan in removals[len(getattr(denoiser, "removals", [])):]:
                surgery.apply(denoiser, plan)
        distributed.broadcast_module(denoiser)
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    return denoiser, pruned


def count_costs(experiment: Experiment, denoiser, rate: float) -> Dict[str, Any]:
    """Return the parameters, bytes, multiply-accumulates and memory of the denoiser in the pipeline.

    For the dense denoiser, also each layer's share. The first calls warm the device up for the timing that follows.
    """
    _ = experiment.batch_call
    shapes = tuple(tensor.shape for tensor in denoiser.state_dict().values())
    shares = costs.layer_shares(denoiser, experiment.single_call) if rate == 0 else {}
    return {**costs.count_parameters(denoiser), "file_bytes": saving.file_bytes(denoiser),
            **experiment.call_costs(shapes), **shares}


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


def make_images(experiment: Experiment, rate: float, on_batch: Optional[Callable[[int], None]] = None):
    """Return the images of a point. Those on disk are read; the others are made, and written batch by batch.

    Several processes share out the batches. The main process returns all images, the others None.
    """
    batches = experiment.batches

    def make(batch):
        if None in [load_image(experiment, rate, index) for index in batch]:
            made = generation.generate(experiment.pipeline, [experiment.samples[index] for index in batch],
                                       **experiment.sampling)
            for index, pixels, finite in zip(batch, made.pixels, made.finite):
                store.save_image(store.Made(pixels, bool(finite), made.seconds_each, made.calls),
                                 image_file(experiment, rate, index), image_provenance(experiment, rate, index))
        if on_batch:
            on_batch(len(batch))

    for batch in batches[distributed.rank::distributed.world_size]:
        make(batch)
    distributed.barrier()
    if not distributed.is_main:
        return None
    for number, batch in enumerate(batches):
        if number % distributed.world_size:  # another process has made it; if not, it is made here
            make(batch)
    return whole_images(experiment, rate)


def whole_images(experiment: Experiment, rate: float) -> generation.Images:
    """Return the images of a point from disk. Raises UserError if one is missing."""
    images = load_images(experiment, rate)
    if images is None:
        raise UserError(f"images in {image_file(experiment, rate, 0).parent} vanished: give the same command again")
    return images


def load_images(experiment: Experiment, rate: float) -> Optional[generation.Images]:
    """Return the images of a point from disk, or None if one is missing or was made in another way."""
    found = [load_image(experiment, rate, index) for index in range(len(experiment.samples))]
    if None in found:
        return None
    pixels, finite, seconds, calls = zip(*found)
    return generation.Images(np.stack(pixels), np.array(finite), float(np.mean(seconds)), max(calls))


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


def time_calls(experiment: Experiment, denoiser, rate: float, images: generation.Images) -> Dict[str, Any]:
    """Return the seconds of a denoiser call and of an image, each beside the dense model's, with intervals of ratios.

    Calls of the pruned and the dense denoiser alternate. The dense model's image time is computed: the image time of
    the pruned model, with the dense call time in place of its own. Dense images made at another moment would compare
    how busy the machine was.
    """
    pipeline, dense, offload = experiment.pipeline, experiment.dense, experiment.offload
    place = (lambda each: pipelines.set_denoiser(pipeline, each, experiment.device, offload)) if offload else None
    image = images.seconds_each
    if rate == 0:
        seconds, = costs.denoiser_seconds([denoiser], experiment.batch_call, place=place)
        return {"denoiser_seconds": seconds, "dense_denoiser_seconds": seconds, "image_seconds": image,
                "dense_image_seconds": image, "ratio_intervals": {}}
    dense_seconds, ratio, ends = costs.time_ratio(
        dense if offload else dense.to(experiment.device), denoiser, experiment.batch_call, place)
    release_dense(pipeline, dense, offload)
    pipelines.set_denoiser(pipeline, denoiser, "cpu" if offload else experiment.device)
    in_calls = min(1.0, images.calls * dense_seconds * ratio / len(experiment.batches[0]) / image)  # share of the time

    def image_ratio(call_ratio: float) -> float:
        return 1 / (1 - in_calls + in_calls / call_ratio)

    return {"denoiser_seconds": dense_seconds * ratio, "dense_denoiser_seconds": dense_seconds,
            "image_seconds": image, "dense_image_seconds": image / image_ratio(ratio),
            "ratio_intervals": {"denoiser_seconds": list(ends), "image_seconds": [image_ratio(end) for end in ends]}}


def save_pruned(experiment: Experiment, denoiser, folder: Path, point: Point) -> None:
    """Save the pipeline with the pruned denoiser as a folder, with what was measured. Raises UserError if it cannot."""
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    sampling = {name: experiment.sampling[name] for name in ("steps", "guidance_scale", "image_size")}
    measured = {name: value for name, value in asdict(point).items() if name not in ("per_image", "seconds")}
    saving.save(experiment.pipeline, pipelines.denoiser_name(experiment.pipeline), folder, sampling,
                pruned_origin(experiment.record, point.rate), measured, experiment.single_call)
