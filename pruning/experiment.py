"""What all points of a record share, made once, and the steps that make a point: prune, make images, time.

pruning_analysis.run_pruning_experiment composes these steps.
"""
from __future__ import annotations

import copy
import functools
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import numpy as np
from tqdm import tqdm

from pruning import UserError, cli, data, distributed, methods
from pruning.data import DATASETS, Sample
from pruning.methods import METHODS, Pruned
from pruning.methods.calibration import Calibration
from pruning.metrics import BACKBONES, METRICS, backbones, costs, scores
from pruning.models import compiling, generation, pipelines, provenance, saving
from pruning.records import store
from pruning.records.record import Notes, Point, Record, protocol_differences

REFERENCE_ROWS = 256  # real images in memory at a time


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all points of a record share. `prepare` makes it once, and nothing assigns to it afterwards."""

    record: Record  # settings, samples, versions; without points
    images_folder: Path
    pipeline: Any  # each point puts its own denoiser into it
    dense: Any  # the dense denoiser: its weights never change; on the CPU unless it runs
    device: str
    offload: Optional[str]  # one of pipelines.OFFLOADS
    sampling: Dict[str, Any]  # keyword arguments of generation.generate
    samples: List[Sample]  # those of the record, once for each noise seed
    originals: np.ndarray  # uint8 (n, size, size, 3), a row a sample
    networks: Dict[str, Any]  # family of backbones -> network; empty in all processes but the main one
    caption_embeddings: Optional[np.ndarray]  # (n, d), if a metric needs them
    reference: Dict[str, scores.Reference]  # family of backbones -> features of the real images to compare with
    floor_features: Dict[str, np.ndarray]  # family -> features of as many other real images, {} if there are none
    calibration: Optional[Calibration]  # if the method asks for one

    @property
    def batches(self) -> List[range]:
        """The positions of the samples, batch by batch. Batches do not depend on the number of processes."""
        size, count = self.sampling["batch_size"], len(self.samples)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @functools.cached_property
    def batch_call(self) -> dict:
        """Keyword arguments of a denoiser call for a batch. The pipeline passes the same at every rate."""
        return generation.first_call(self.pipeline, [self.samples[i] for i in self.batches[0]], **self.sampling)

    @functools.cached_property
    def single_call(self) -> dict:
        """Keyword arguments of a denoiser call for one image."""
        return generation.first_call(self.pipeline, self.samples[:1], **self.sampling)

    @functools.lru_cache(maxsize=None)  # noqa: B019 - an experiment lives as long as its command
    def call_costs(self, shapes: tuple) -> Dict[str, int]:
        """The macs and peak_bytes of a call of the pipeline's denoiser, whose tensors have these shapes."""
        denoiser = getattr(self.pipeline, pipelines.denoiser_name(self.pipeline))
        return {"macs": costs.count_macs(denoiser, self.single_call),
                "peak_bytes": costs.peak_bytes(denoiser, self.single_call)}


class Dense(NamedTuple):
    """What a point is compared with: the dense model's images and their values."""

    images: np.ndarray  # uint8 (n, size, size, 3)
    per_image: Dict[str, list]  # metric -> value of each image


# ---- preparation

def prepare(args, path: Path, earlier: Optional[Record]) -> Experiment:
    """Load everything that the points share. What can fail first comes first.

    path: of the record, beside which the images lie. earlier: the record of an earlier run that this run continues.
    Raises UserError if something cannot be had, or if `earlier` was measured with other settings.
    """
    options = cli.method_options(args)
    device = distributed.initialize(pipelines.pick_device(args.device))
    if args.offload and device == "cpu":
        raise UserError(f"--offload {args.offload} needs a GPU; on the CPU there is nothing to offload")
    with distributed.main_first():
        samples, skipped = data.load_samples(args.dataset, args.num_images, args.seed, args.data_dir)
    captions = training_captions(args, samples)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    model = args.model or DATASETS[args.dataset].default_model
    kind = args.metric_backbones or DATASETS[args.dataset].backbones
    measured = earlier.settings["metrics"] if earlier else []
    chosen = [name for name in METRICS if name in args.metrics or name in measured]  # all points have the same
    families = {name: METRICS[name].backbone for name in chosen if METRICS[name].backbone}
    networks = {family: backbones.load_backbone(kind, family, device)
                for family in dict.fromkeys(families.values()) if distributed.is_main}
    with distributed.main_first():
        pipeline = pipelines.load_pipeline(model, "cpu" if args.offload else device, dtype)
    generation.remember_prompts(pipeline)
    dense = pipelines.take_denoiser(pipeline)
    sampling = {"seed": args.seed, **pipelines.sampling_settings(pipeline, model, {
        name: getattr(args, name) for name in ("steps", "guidance_scale", "image_size")})}
    sampling["batch_size"] = (args.batch_size or (earlier and earlier.settings.get("batch_size"))
                              or choose_batch_size(pipeline, dense, samples[0], device, args.offload, sampling))

    weights = {family: provenance.fingerprint(network.model if isinstance(network, backbones.Clip) else network)
               for family, network in networks.items()}
    described = {family: f"{BACKBONES[kind][family]}, {weights[family]}" for family in weights}
    repeated = [sample._replace(repeat=repeat) for repeat in range(args.seeds) for sample in samples]
    record = Record(
        model=pipelines.label(model), dataset=args.dataset, method=args.method, options=options,
        samples=[{"id": sample.id, "caption": sample.caption} for sample in samples],
        settings={**sampling, "seeds": args.seeds, "resize": data.RESIZE_RULE, "metrics": chosen,
                  "metric_backbones": kind, "denoiser": provenance.fingerprint(dense),
                  "pipeline": provenance.fingerprint_rest(pipeline, pipelines.denoiser_name(pipeline)),
                  "dtype": dtype, "compile": args.compile, "offload": args.offload,
                  **distributed.broadcast(provenance.machine(device))},
        backbones={name: described[family] for name, family in families.items() if family in described},
        notes=None, versions=provenance.package_versions(), dense=None, points=[])
    if earlier:
        check_continues(earlier, record, path)

    originals = data.load_originals(samples, sampling["image_size"])
    embeddings, truncated = backbones.embed_captions(networks["clip"], [sample.caption for sample in repeated]) \
        if "clip" in networks else (None, 0)
    sets = sorted({METRICS[name].backbone for name in chosen if METRICS[name].against == "reference"} & set(networks))
    real = data.reference_samples(args.dataset, samples, args.data_dir) if sets else []
    others = data.other_samples(args.dataset, samples, args.seed, args.data_dir) if sets else []
    describe = functools.partial(describe_originals, networks, described, record.versions, device,
                                 sampling["image_size"])
    reference = {family: scores.Reference(describe(family, real)) for family in sets}
    code = [*(earlier.notes.code if earlier else []), provenance.code_version()]
    notes = Notes(captions_skipped=skipped, captions_truncated=truncated, code=list(dict.fromkeys(code)),
                  reference_images=len(real),
                  feature_sizes={family: each.features.shape[1] for family, each in reference.items()})

    def record_calls() -> list:
        """Record the dense denoiser's calls while it draws the training captions."""
        lessons = [Sample(f"recovery-{i:05d}", caption, None) for i, caption in enumerate(captions)]
        pipelines.set_denoiser(pipeline, dense, device, args.offload)
        with tqdm(total=len(lessons), unit="image", desc="calibration images") as bar:
            calls = generation.record_calls(pipeline, lessons, on_batch=bar.update, **sampling)
        release_dense(pipeline, dense, args.offload)
        return calls

    return Experiment(
        record=replace(record, notes=notes), images_folder=path.parent / "images", pipeline=pipeline, dense=dense,
        device=device, offload=args.offload, sampling=sampling, samples=repeated,
        originals=np.tile(originals, (args.seeds, 1, 1, 1)), networks=networks, caption_embeddings=embeddings,
        reference=reference, floor_features={family: describe(family, others) for family in sets if others},
        calibration=Calibration(record_calls, args.seed, checkpoint_file(path), sampling["guidance_scale"],
                                min(sampling["batch_size"], len(captions))) if captions else None)


def training_captions(args, samples: List[Sample]) -> List[str]:
    """Return the captions that the method calibrates on, none of them measured; [] if the method does not calibrate."""
    count = METHODS[args.method].calibration_images
    return data.training_captions(args.dataset, count, args.seed, args.data_dir, samples) if count else []


def checkpoint_file(path: Path) -> Path:
    """Return the file in which a method may keep its state until the sweep that writes `path` is finished."""
    return path.with_suffix(".checkpoint.safetensors")


def check_continues(earlier: Record, record: Record, path: Path) -> None:
    """Raise UserError with the differences if `record` does not continue `earlier`. Other metrics are no difference."""
    differences = protocol_differences(earlier, record, continuing=True)
    if differences:
        raise UserError(f"{path} was measured with other settings ({'; '.join(differences)}): "
                        "use the same settings, another --results_dir, or --overwrite to start afresh")


def choose_batch_size(pipeline, dense, sample: Sample, device: str, offload: Optional[str], sampling: dict) -> int:
    """Return the batch size that fits the device, the same in all processes."""
    pipelines.set_denoiser(pipeline, dense, device, offload)
    size = generation.fitting_batch_size(pipeline, sample, device, sampling["guidance_scale"], sampling["image_size"])
    release_dense(pipeline, dense, offload)
    return distributed.broadcast(size)


def describe_originals(networks, described, versions, device: str, size: int, family: str, samples) -> np.ndarray:
    """Return the features (n, d) of the samples' originals, some images at a time, from the cache if they are there."""
    key = provenance.provenance_hash(backbone=described[family], versions=versions, device=device,
                                     code=provenance.source_hash(backbones))
    rows = []
    for start in tqdm(range(0, len(samples), REFERENCE_ROWS), desc="real images", delay=2, leave=False):
        originals = data.load_originals(samples[start:start + REFERENCE_ROWS], size)
        rows.append(store.cached_features(functools.partial(backbones.describe, family, networks[family]),
                                          originals, key))
    return np.concatenate(rows)


# ---- the steps of a point

@contextmanager
def add_seconds(stage: str, seconds: Dict[str, float]):
    """Add the wall time of the block to seconds[stage]."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


def prune_copy(experiment: Experiment, rate: float):
    """Prune a copy of the dense denoiser and put it into the pipeline. Returns the copy and what the method reports.

    A calibrated method may train, which may end differently in each process: the main process prunes for all.
    Then the report is None in the others.
    """
    method, options = experiment.record.method, experiment.record.options
    calibrates = METHODS[method].calibrates
    denoiser = copy.deepcopy(experiment.dense).to("cpu" if experiment.offload else experiment.device)
    pruned: Optional[Pruned] = None
    if distributed.is_main or not calibrates:
        pruned = methods.prune(method, denoiser, rate, calibration=experiment.calibration, **options)
    if calibrates:
        distributed.broadcast_module(denoiser)
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    return denoiser, pruned


def release_dense(pipeline, dense, offload: Optional[str]) -> None:
    """Bring the dense denoiser back to the CPU after the pipeline has used it."""
    if offload:
        pipeline.remove_all_hooks()
    dense.to("cpu")


def count_costs(experiment: Experiment, denoiser) -> Dict[str, int]:
    """Return the parameters, bytes, multiply-accumulates and memory of the denoiser in the pipeline.

    The first calls also warm the device up for the timing that follows.
    """
    _ = experiment.batch_call
    shapes = tuple(tensor.shape for tensor in denoiser.state_dict().values())
    return {**costs.count_parameters(denoiser), **experiment.call_costs(shapes)}


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
    one_step = {**experiment.sampling, "steps": 1}
    calls.observe(lambda: generation.generate(experiment.pipeline, experiment.samples[:size], **one_step))


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
        "steps", "guidance_scale", "image_size", "dtype", "compile", "offload", "device", "pipeline", "denoiser")}
    packages = {name: versions[name] for name in ("torch", "diffusers", "transformers")}
    return provenance.provenance_hash(
        **sampled, **packages, pruned=pruned_origin(experiment.record, rate) if rate else {}, sample=sample.id,
        caption=sample.caption, noise=settings["seed"] + sample.repeat)


def pruned_origin(record: Record, rate: float) -> Dict[str, Any]:
    """Return all that decides the weights of a pruned model."""
    seed = {"seed": record.settings["seed"]} if METHODS[record.method].calibrates else {}
    return {"model": record.model, "denoiser": record.settings["denoiser"], "method": record.method, "rate": rate,
            **record.options, **seed}


def time_calls(experiment: Experiment, denoiser, rate: float, images: generation.Images) -> Dict[str, float]:
    """Return the seconds of a denoiser call and of an image, each beside the dense model's.

    Calls of the pruned and the dense denoiser alternate. The dense model's image time is computed: the image time of
    the pruned model, with the dense call time in place of its own. Dense images made at another moment would compare
    how busy the machine was.
    """
    pipeline, dense, offload = experiment.pipeline, experiment.dense, experiment.offload
    place = (lambda each: pipelines.set_denoiser(pipeline, each, experiment.device, offload)) if offload else None
    if rate == 0:
        seconds, = costs.denoiser_seconds([denoiser], experiment.batch_call, place=place)
        return {"denoiser_seconds": seconds, "dense_denoiser_seconds": seconds,
                "image_seconds": images.seconds_each, "dense_image_seconds": images.seconds_each}
    dense_seconds, seconds = costs.denoiser_seconds(
        [dense if offload else dense.to(experiment.device), denoiser], experiment.batch_call, place=place)
    release_dense(pipeline, dense, offload)
    pipelines.set_denoiser(pipeline, denoiser, "cpu" if offload else experiment.device)
    in_calls = min(1.0, images.calls * seconds / len(experiment.batches[0]) / images.seconds_each)  # share of the time
    return {"denoiser_seconds": seconds, "dense_denoiser_seconds": dense_seconds,
            "image_seconds": images.seconds_each,
            "dense_image_seconds": images.seconds_each * (1 - in_calls + in_calls * dense_seconds / seconds)}


def save_pruned(experiment: Experiment, denoiser, folder: Path, point: Point) -> None:
    """Save the pipeline with the pruned denoiser as a folder, with what was measured. Raises UserError if it cannot."""
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    sampling = {name: experiment.sampling[name] for name in ("steps", "guidance_scale", "image_size")}
    measured = {name: value for name, value in asdict(point).items() if name not in ("per_image", "seconds")}
    saving.save(experiment.pipeline, pipelines.denoiser_name(experiment.pipeline), folder, sampling,
                pruned_origin(experiment.record, point.rate), measured)
