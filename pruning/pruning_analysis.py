"""Sweep a pruning method over rates: prune, make images, measure, record, draw.

example:
  python pruning/pruning_analysis.py --method magnitude --num_images 50 --dataset coco
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # instead of pruning/, whose file names must not shadow packages

import copy
import functools
import math
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Dict, List, Optional

import numpy as np
from tqdm import tqdm

from pruning import UserError, cli, data, distributed, methods, metrics
from pruning.data import DATASETS
from pruning.methods import METHODS
from pruning.metrics import BACKBONES, DISTANCES, METRICS, costs
from pruning.models import pipelines, saving
from pruning.records import findings, plots, store
from pruning.records.record import (
    BrokenRecordError,
    Point,
    Record,
    protocol_differences,
    read_record,
    record_path,
    write_record,
)
from pruning.records.summaries import answer, summary

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DESCRIBE = {"clip": metrics.embed_images, "features": metrics.image_features}
REFERENCE_ROWS = 256  # real images held at a time
RECOVERY_IMAGES = 128  # dense images whose denoiser calls the iterative method trains on


@dataclass
class Experiment:
    """What all points of a record share, made once by prepare()."""

    record: Record
    path: Path  # of the record; its images lie beside it
    pipeline: Any
    dense: Any  # the dense denoiser, on the CPU, never changed
    device: str
    offload: Optional[str]  # one of pipelines.OFFLOADS
    compile: bool  # whether torch.compile makes the denoiser faster
    options: Dict[str, Any]  # keyword arguments of the method
    sampling: Dict[str, Any]  # keyword arguments of pipelines.generate
    samples: List[data.Sample]  # those of the record, once for each noise seed
    originals: np.ndarray  # uint8 (n, size, size, 3), as all arrays below a row a sample
    networks: Dict[str, Any]  # family of backbones -> its network
    earlier: Optional[Record]  # which an earlier run left and `record` goes on with
    caption_embeddings: Optional[np.ndarray] = None  # (n, d)
    reference: Dict[str, metrics.Reference] = field(default_factory=dict)  # backbone -> its features of real images
    dense_images: Optional[np.ndarray] = None  # uint8 (n, size, size, 3), made by the point at rate 0
    dense_values: Optional[Dict[str, list]] = None  # metric -> values of these images
    call: Optional[dict] = None  # keyword arguments of a denoiser call for a batch, and for one image
    single_call: Optional[dict] = None
    counts: Dict[tuple, Dict[str, int]] = field(default_factory=dict)  # shapes of a denoiser -> its macs and peak_bytes
    calls: int = 0  # of the denoiser while a batch of images is made


def run_pruning_experiment(experiment: Experiment, rate: float, on_batch=None, measured=None) -> Point:
    """Measure one point: prune the dense denoiser to `rate`, make the images, score them. Rate 0 is the dense model.

    measured: the point as an earlier run left it, where only metrics are missing; its images are taken from disk.
    """
    drawn = None if measured is None else kept_images(experiment, rate)
    if drawn is None:
        measured, drawn = prune_and_draw(experiment, rate, on_batch)
    elif on_batch:
        on_batch(len(drawn.pixels))
    if not distributed.first:
        return measured
    started = time.perf_counter()

    images = drawn.pixels
    dense_images = images if rate == 0 else experiment.dense_images
    clip, features, perceptual = (experiment.networks.get(family) for family in ("clip", "features", "lpips"))
    embedded = functools.lru_cache(None)(lambda: metrics.embed_images(clip, images))
    featured = functools.lru_cache(None)(lambda: metrics.image_features(features, images))
    measure = {
        "clip_score": lambda: metrics.clip_score(embedded(), experiment.caption_embeddings),
        "kid": lambda: metrics.kid(featured(), experiment.reference["features"]),
        "cmmd": lambda: metrics.cmmd(embedded(), experiment.reference["clip"]),
        "fid": lambda: metrics.fid(featured(), experiment.reference["features"]),
        "lpips": lambda: metrics.lpips(perceptual, images, experiment.originals),
        "lpips_dense": lambda: metrics.lpips(perceptual, images, dense_images),
        "ssim_dense": lambda: metrics.ssim(images, dense_images),
        "psnr_dense": lambda: metrics.psnr(images, dense_images),
        "generation_time": lambda: drawn.seconds_each,
    }
    values = {name: measure[name]() for name in experiment.record.settings["metrics"]}
    dense = experiment.dense_values if rate else None
    means, per_image, intervals = metrics.summarise(values, drawn.finite, dense, experiment.record.settings["seeds"])
    if rate == 0:
        experiment.dense_images, experiment.dense_values = images, per_image
        experiment.record.notes["seed_spread"] = seed_spread(experiment, images, per_image)
    return replace(measured, metrics=means, intervals=intervals, per_image=per_image,
                   seconds={**measured.seconds, "measure": round(time.perf_counter() - started, 3)})


def prune_and_draw(experiment: Experiment, rate: float, on_batch=None):
    """A point without its metrics, and its images: prune, make what is not on disk, time the denoiser beside dense.

    Of several processes the first does it all, and the others make images only.
    """
    clock = [time.perf_counter()]
    denoiser, pruned = pruned_copy(experiment, rate)
    use(experiment, denoiser)
    clock.append(time.perf_counter())
    counted = {**costs.count_parameters(denoiser), **warm_up(experiment, denoiser)}
    clock.append(time.perf_counter())
    drawn = make_images(experiment, rate, on_batch)
    if not distributed.first:
        return None, None
    experiment.record.notes["left_out"] = pruned.left_out
    clock.append(time.perf_counter())
    timed = time_costs(experiment, denoiser, drawn.seconds_each)
    clock.append(time.perf_counter())
    prune, warm, generate, timing = np.diff(clock)
    return Point(
        rate=rate, sparsity=pruned.taken / pruned.total, unit=pruned.unit, units_total=pruned.total,
        units_asked=pruned.asked, units_taken=pruned.taken, **counted, **timed, metrics={}, intervals={}, per_image={},
        seconds={"prune": round(prune, 3), "generate": round(generate, 3), "time": round(warm + timing, 3)}), drawn


def make_images(experiment: Experiment, rate: float, on_batch=None) -> Optional[pipelines.Images]:
    """The images of a point, by whole batches, as they were made or are made now; each is kept once it is there.

    Several processes share out the batches; the first gets the images, the others None.
    """
    samples, size = experiment.samples, experiment.sampling["batch_size"]
    # Cut by the order of samples, not by how many processes there are, so that batches are the same for any number.
    batches = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]

    def make(batch):
        if None in [kept_image(experiment, rate, index) for index in batch]:
            made = pipelines.generate(experiment.pipeline, [samples[index] for index in batch], **experiment.sampling)
            experiment.calls = len(experiment.pipeline.scheduler.timesteps)  # more than steps where each takes two
            for index, pixels, finite in zip(batch, made.pixels, made.finite):
                store.save(store.Made(pixels, bool(finite), made.seconds_each), image_file(experiment, rate, index),
                          made_by(experiment, rate, samples[index]))
        if on_batch:
            on_batch(len(batch))

    for batch in batches[distributed.rank::distributed.count]:
        make(batch)
    distributed.wait()
    if not distributed.first:
        return None
    for number, batch in enumerate(batches):
        if number % distributed.count:  # another's, which is there by now, or else is made here
            make(batch)
    return kept_images(experiment, rate)


def kept_images(experiment: Experiment, rate: float) -> Optional[pipelines.Images]:
    """The images of a point from disk, None where one is missing or was made otherwise."""
    found = [kept_image(experiment, rate, index) for index in range(len(experiment.samples))]
    if None in found:
        return None
    pixels, finite, seconds = zip(*found)
    return pipelines.Images(np.stack(pixels), np.array(finite), float(np.mean(seconds)))


def kept_image(experiment: Experiment, rate: float, index: int) -> Optional[store.Made]:
    """An image of a point from disk, None where it is missing or was made otherwise."""
    return store.load(image_file(experiment, rate, index), made_by(experiment, rate, experiment.samples[index]))


def image_file(experiment: Experiment, rate: float, index: int) -> Path:
    """Where an image of a point lies, as plots finds it."""
    method = experiment.record.method
    return experiment.path.parent / "images" / method / findings.rate_folder(rate) / store.file_name(index)


def made_by(experiment: Experiment, rate: float, sample: data.Sample) -> str:
    """The hash of all that decides the pixels of an image."""
    settings, versions = experiment.record.settings, experiment.record.versions
    sampled = {name: settings[name] for name in (
        "steps", "guidance_scale", "image_size", "dtype", "compile", "offload", "device", "pipeline", "denoiser")}
    packages = {name: versions[name] for name in ("torch", "diffusers", "transformers")}
    pruned = origin(experiment, rate) if rate else {}
    return store.made_by(**sampled, **packages, pruned=pruned, sample=sample.id, caption=sample.caption,
                          noise=settings["seed"] + sample.repeat)


def seed_spread(experiment: Experiment, images: np.ndarray, per_image: dict) -> Dict[str, float]:
    """How far the dense model is from itself under other noise, so that a smaller change can be told to be none.

    For a distance to the dense images: the mean between those of the first seed and of the others. For other
    metrics: the standard deviation of the difference between the means of two seeds.
    """
    seeds = experiment.record.settings["seeds"]
    if seeds == 1:
        return {}
    first, others = np.split(images, [len(images) // seeds])
    first = np.tile(first, (seeds - 1, 1, 1, 1))
    between = {
        "lpips_dense": lambda: metrics.lpips(experiment.networks["lpips"], others, first),
        "ssim_dense": lambda: metrics.ssim(others, first),
        "psnr_dense": lambda: metrics.psnr(others, first),
    }
    spread = {name: float(between[name]().mean()) for name in per_image if name in between}
    for name in set(per_image) - set(between):
        deviations = np.array(per_image[name], float).reshape(seeds, -1).std(axis=0, ddof=1)
        spread[name] = math.sqrt(2 * np.mean(deviations ** 2) / len(deviations))
    return spread


def pruned_copy(experiment: Experiment, rate: float):
    """A pruned copy of the dense denoiser, and what the method says of it."""
    method = experiment.record.method
    denoiser = copy.deepcopy(experiment.dense).to("cpu" if experiment.offload else experiment.device)
    if not METHODS[method].recovers:
        return denoiser, methods.prune(method, denoiser, rate, **experiment.options)
    # Training may not end alike in each of several processes: the first does it for all.
    pruned = methods.prune(method, denoiser, rate, **experiment.options) if distributed.first else None
    distributed.share(denoiser)
    return denoiser, pruned


def use(experiment: Experiment, denoiser) -> None:
    """Make the pipeline use this denoiser."""
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)


def take_back(experiment: Experiment) -> None:
    """Bring the dense denoiser back to the CPU, after the pipeline used it."""
    if experiment.offload:
        experiment.pipeline.remove_all_hooks()
    experiment.dense.to("cpu")


def warm_up(experiment: Experiment, denoiser) -> Dict[str, int]:
    """Make all ready to be timed, which also tells what a call of the denoiser costs in counts."""
    samples, sampling = experiment.samples, experiment.sampling
    if experiment.call is None:  # what the pipeline passes is alike at every rate
        batch = sampling["batch_size"]
        experiment.call = pipelines.first_call(experiment.pipeline, samples[:batch], **sampling)
        experiment.single_call = pipelines.first_call(experiment.pipeline, samples[:1], **sampling)
    shapes = tuple(tensor.shape for tensor in denoiser.state_dict().values())
    if shapes not in experiment.counts:  # zeros change neither
        experiment.counts[shapes] = {"macs": costs.count_macs(denoiser, experiment.single_call),
                                     "peak_bytes": costs.peak_bytes(denoiser, experiment.single_call)}
    if experiment.compile:
        for part in (denoiser, experiment.dense):
            part.compile()
        batch = sampling["batch_size"]
        for count in {min(batch, len(samples)), len(samples) % batch or batch}:  # each size is compiled apart
            pipelines.generate(experiment.pipeline, samples[:count], **{**sampling, "steps": 1})
    return experiment.counts[shapes]


def time_costs(experiment: Experiment, denoiser, image_seconds: float) -> Dict[str, float]:
    """Seconds of a denoiser call and of an image, each beside what it would have been with dense at that moment.

    Calls are taken in turn. An image of the dense model is this one with dense's calls in place of its own: dense
    images of another moment, when the machine was busier or less busy, would compare the moments.
    """
    place = (lambda denoiser: use(experiment, denoiser)) if experiment.offload else None
    if experiment.record.dense is None:  # this is the dense one
        seconds, = costs.denoiser_seconds([denoiser], experiment.call, place=place)
        return {"denoiser_seconds": seconds, "dense_denoiser_seconds": seconds, "image_seconds": image_seconds,
                "dense_image_seconds": image_seconds}
    dense = experiment.dense if experiment.offload else experiment.dense.to(experiment.device)
    dense_seconds, seconds = costs.denoiser_seconds([dense, denoiser], experiment.call, place=place)
    take_back(experiment)
    pipelines.set_denoiser(experiment.pipeline, denoiser, "cpu" if experiment.offload else experiment.device)
    together = min(experiment.sampling["batch_size"], len(experiment.samples))
    in_calls = min(1.0, experiment.calls * seconds / together / image_seconds)  # share of an image's time
    return {"denoiser_seconds": seconds, "dense_denoiser_seconds": dense_seconds, "image_seconds": image_seconds,
            "dense_image_seconds": image_seconds * (1 - in_calls + in_calls * dense_seconds / seconds)}


def prepare(args) -> Experiment:
    """Load what the points share, first what can fail first; refuse to continue a record of other settings."""
    options = method_options(args)
    device = distributed.begin(pipelines.pick_device(args.device))
    if args.offload and device == "cpu":
        raise UserError(f"--offload {args.offload} keeps parts of a GPU's work on the CPU; here all is on the CPU")
    with distributed.in_turn():
        samples, skipped = data.load_samples(args.dataset, args.num_images, args.seed, args.data_dir)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    model = args.model or DATASETS[args.dataset].default_model
    kind = args.metric_backbones or DATASETS[args.dataset].backbones
    path = own_path(args)
    with distributed.in_turn():
        earlier = None if args.overwrite else earlier_record(path)
    measured = earlier.settings["metrics"] if earlier else []
    chosen = [name for name in METRICS if name in args.metrics or name in measured]  # all points have the same
    families = {name: METRICS[name].backbone for name in chosen if METRICS[name].backbone}
    networks = {family: metrics.load_backbone(kind, family, device)
                for family in dict.fromkeys(families.values()) if distributed.first}
    with distributed.in_turn():
        pipeline = pipelines.load_pipeline(model, "cpu" if args.offload else device, dtype)
    dense = pipelines.take_denoiser(pipeline)
    sampling = pipelines.sampling_settings(pipeline, model, {
        name: getattr(args, name) for name in ("steps", "guidance_scale", "image_size")})
    sampling.update(seed=args.seed, batch_size=args.batch_size or (earlier and earlier.settings.get("batch_size")))
    pipelines.remember_prompts(pipeline)
    if not sampling["batch_size"]:
        pipelines.set_denoiser(pipeline, dense, device, args.offload)
        sampling["batch_size"] = distributed.agree(pipelines.fitting_batch_size(
            pipeline, samples[0], device, sampling["guidance_scale"], sampling["image_size"]))
        if args.offload:
            pipeline.remove_all_hooks()
        dense.to("cpu")

    weights = {family: pipelines.fingerprint(network.model if isinstance(network, metrics.Clip) else network)
               for family, network in networks.items()}
    record = Record(
        model=pipelines.label(model), dataset=args.dataset, method=args.method,
        samples=[{"id": sample.id, "caption": sample.caption} for sample in samples],
        settings={**sampling, **options, "seeds": args.seeds, "resize": data.RESIZE_RULE,
                  "metrics": chosen, "metric_backbones": kind, "denoiser": pipelines.fingerprint(dense),
                  "pipeline": pipelines.fingerprint_rest(pipeline), "dtype": dtype, "compile": args.compile,
                  "offload": args.offload, **distributed.agree(pipelines.machine(device))},
        backbones={name: f"{BACKBONES[kind][family]}, {weights[family]}" for name, family in families.items()
                   if family in weights},
        notes={"captions_skipped": skipped, "code": [code_version()]}, versions=pipelines.versions(),
        dense=None, points=[])
    if earlier:
        record = continued(earlier, record, path)
    experiment = Experiment(
        record=record, path=path, pipeline=pipeline, dense=dense, device=device,
        offload=args.offload, compile=args.compile, options=options, sampling=sampling,
        samples=[sample._replace(repeat=repeat) for repeat in range(args.seeds) for sample in samples],
        originals=np.tile(data.load_originals(samples, sampling["image_size"]), (args.seeds, 1, 1, 1)),
        networks=networks, earlier=earlier, calls=sampling["steps"])
    if not distributed.first:
        return experiment
    if "clip_score" in families:
        experiment.caption_embeddings, record.notes["captions_truncated"] = metrics.embed_captions(
            networks["clip"], [sample.caption for sample in experiment.samples])
    add_reference(experiment, samples, args)
    return experiment


def add_reference(experiment: Experiment, samples, args) -> None:
    """What sets of images are compared with: features of real images, and how near as many other real ones come."""
    record = experiment.record
    sets = [name for name in record.settings["metrics"] if name in DISTANCES]
    if not sets:
        return
    reference = data.reference_samples(args.dataset, samples)
    others = data.other_samples(args.dataset, samples, args.seed, args.data_dir)
    families = sorted({METRICS[name].backbone for name in sets})
    described = describe_originals(experiment, families, reference)
    experiment.reference = {family: metrics.Reference(described[family]) for family in families}
    record.notes["reference_images"] = len(reference)
    if "features" in families:
        record.notes["fid_feature_size"] = described["features"].shape[1]
    real = describe_originals(experiment, families, others) if others else {}
    record.notes["floors"] = {name: DISTANCES[name](real[family], experiment.reference[family]).value
                              for name in sets for family in [METRICS[name].backbone] if others}


def describe_originals(experiment: Experiment, families: List[str], samples) -> Dict[str, np.ndarray]:
    """What networks make of the samples' originals, (n, d) each; of some at a time, as there may be thousands."""
    described = {family: [] for family in families}
    for start in tqdm(range(0, len(samples), REFERENCE_ROWS), desc="real images", delay=2, leave=False):
        originals = data.load_originals(samples[start:start + REFERENCE_ROWS], experiment.sampling["image_size"])
        for family in families:
            describe = functools.partial(DESCRIBE[family], experiment.networks[family])
            backbone = next(text for name, text in experiment.record.backbones.items()
                            if METRICS[name].backbone == family)
            described[family].append(store.features(describe, originals, {
                "backbone": backbone, "versions": experiment.record.versions, "device": experiment.device,
                "code": Path(metrics.__file__).read_text(encoding="utf-8")}))
    return {family: np.concatenate(rows) for family, rows in described.items()}


def method_options(args) -> Dict[str, Any]:
    """The method's options, given or by default. Raises UserError for one that the method does not have."""
    options = dict(METHODS[args.method].options)
    for name in sorted({name for method in METHODS.values() for name in method.options}):
        given = getattr(args, name)
        if given is not None and name not in options:
            users = ", ".join(method for method, entry in METHODS.items() if name in entry.options)
            raise UserError(f"--{name} does nothing for the method {args.method}; it belongs to {users}")
        if given is not None:
            options[name] = given
    return options


def code_version() -> str:
    """The git commit that runs, and whether the code is as committed; 'unknown' where it is not from a clone."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("" if not git("status", "--porcelain", "--", "pruning") else " with changes")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def earlier_record(path: Path) -> Optional[Record]:
    """The record at `path`, None where there is none. A broken file is set aside under another name."""
    try:
        return read_record(path) if path.exists() else None
    except BrokenRecordError as error:
        print(f"{error}; {store.set_aside(path)}, and measured again from the images", file=sys.stderr)
        return None


def continued(earlier: Record, record: Record, path: Path) -> Record:
    """What was measured earlier, for `record` to go on with; a UserError names what differs in the measuring.

    Metrics may differ: those that it lacks are measured on its images.
    """
    differences = protocol_differences(earlier, record, continuing=True)
    if differences:
        raise UserError(f"{path} was measured otherwise ({'; '.join(differences)}): "
                        "use the same settings, another --results_dir, or --overwrite to start afresh")
    code = list(dict.fromkeys([*earlier.notes.get("code", []), *record.notes["code"]]))
    return replace(record, dense=earlier.dense, points=earlier.points,
                   notes={**earlier.notes, **record.notes, "code": code})


def add_recovery(experiment: Experiment, args) -> None:
    """What recovery trains on: the calls of the dense denoiser while it draws captions that are not measured."""
    if not experiment.options["recovery_steps"]:
        return
    texts = data.training_captions(args.dataset, RECOVERY_IMAGES, args.seed, args.data_dir, experiment.samples)
    lessons = [data.Sample(f"recovery-{i:05d}", text, None) for i, text in enumerate(texts)]
    use(experiment, experiment.dense)
    with tqdm(total=len(lessons), unit="image", desc="dense images to recover with") as bar:
        calls = pipelines.record_calls(experiment.pipeline, lessons, on_batch=bar.update, **experiment.sampling)
    take_back(experiment)
    experiment.options.update(calls=calls, checkpoint=walk_file(experiment), seed=args.seed)


def walk_file(experiment: Experiment) -> Path:
    """Where a recovering method keeps its last denoiser until the sweep is finished."""
    return experiment.path.with_suffix(".walk.safetensors")


def sweep(args) -> Path:
    """Measure the dense model and every rate that the record lacks, then draw. Returns the record's path."""
    experiment = prepare(args)
    path = own_path(args)
    if not distributed.first:
        measure_all(experiment, args, path)
        return path
    with store.only_writer(path):
        if args.overwrite:  # no image of an earlier run stays beside the new ones
            shutil.rmtree(image_file(experiment, 0.0, 0).parents[1], ignore_errors=True)
        elif earlier_record(path) != experiment.earlier:
            raise UserError(f"{path} was written by another process meanwhile: give the same command again")
        try:
            measure_all(experiment, args, path)
        finally:
            # Also after Ctrl-C: what is finished is worth a look.
            if experiment.record.dense and path.exists() and not args.shard:
                plots.draw_all(read_record(path), path.parent, path.parent / "images", args.tolerance)
            if args.discard_images:
                discard_images(experiment)
    if findings.left_out(experiment.record):
        print(findings.left_out(experiment.record), file=sys.stderr)
    return path


def measure_all(experiment: Experiment, args, path: Path) -> None:
    """Measure what the record lacks, metrics of its points and points, and write it after each."""
    record, folders = experiment.record, saved_folders(args)
    known = {point.rate: point for point in (record.dense, *record.points) if point}
    lacking = any(set(point.metrics) != set(record.settings["metrics"]) for point in known.values())
    unsaved = [rate for rate in folders if not saving.is_saved(folders[rate], origin(experiment, rate))]
    missing = [rate for rate in args.rates if rate not in known]
    again = list(known) if lacking else []  # all at once, as all points have the same metrics
    if not (missing or again or unsaved):
        return
    if record.dense:
        experiment.dense_values = record.dense.per_image
        drawn = kept_images(experiment, 0.0)
        experiment.dense_images = None if drawn is None else drawn.pixels
    if missing and not again and experiment.dense_images is None:
        again = [0.0]
    for rate in again:
        if kept_images(experiment, rate) is None:
            known.pop(rate, None)
    distributed.wait()  # until all have seen what there is, before it changes
    if METHODS[record.method].recovers and distributed.first and (unsaved or {*missing, *again} - set(known) - {0.0}):
        add_recovery(experiment, args)

    def measure(rate):
        bar.set_description(f"{record.method} {rate:g}" if rate else "dense")
        known[rate] = run_pruning_experiment(experiment, rate, on_batch=bar.update, measured=known.get(rate))

    def write():
        if distributed.first:
            record.dense, *record.points = (known[rate] for rate in sorted(known))
            write_record(record, path)

    with tqdm(total=len([*again, *missing]) * len(experiment.samples), unit="image",
              disable=not (again or missing) or not distributed.first) as bar:
        for rate in again:
            measure(rate)
        if again:
            write()
        for rate in sorted({*missing, *unsaved}):
            if rate in missing:
                measure(rate)
                write()
            else:  # measured by an earlier run that did not save it
                use(experiment, pruned_copy(experiment, rate)[0])
            if rate in unsaved and distributed.first:
                save_pruned(experiment, folders[rate], known[rate])
            if args.discard_images and distributed.first:
                discard_images(experiment, rate)
    if distributed.first and walk_file(experiment).exists():
        walk_file(experiment).unlink()


def discard_images(experiment: Experiment, *rates: float) -> None:
    """Delete the images of these rates, or of all and dense, that no figure shows."""
    for rate in rates or (0.0, *(point.rate for point in experiment.record.points)):
        for index in range(plots.ROWS, len(experiment.samples)):
            with suppress(FileNotFoundError):
                image_file(experiment, rate, index).unlink()


def own_path(args) -> Path:
    """Where the record of these arguments lives."""
    model = args.model or DATASETS[args.dataset].default_model
    return record_path(args.results_dir, pipelines.label(model), args.dataset, args.method, args.shard)


def saved_folders(args) -> Dict[float, Path]:
    """Where --save_pruned puts the pipeline of each rate: the folder given, or one in it for each of several rates."""
    if args.save_pruned is None:
        return {}
    if len(args.rates) == 1:
        return {args.rates[0]: args.save_pruned}
    return {rate: args.save_pruned / findings.rate_folder(rate) for rate in args.rates}


def origin(experiment: Experiment, rate: float) -> Dict[str, Any]:
    """What makes a pruned model the one it is."""
    record = experiment.record
    options = {name: record.settings[name] for name in METHODS[record.method].options}
    return {"model": record.model, "denoiser": record.settings["denoiser"], "method": record.method, "rate": rate,
            **options, **({"seed": record.settings["seed"]} if METHODS[record.method].recovers else {})}


def save_pruned(experiment: Experiment, folder: Path, point: Point) -> None:
    """Save the pipeline with the denoiser that it has now, which was measured as `point`."""
    sampling = {name: experiment.sampling[name] for name in ("steps", "guidance_scale", "image_size")}
    measured = {name: value for name, value in asdict(point).items() if name not in ("per_image", "seconds")}
    saving.save(experiment.pipeline, pipelines.denoiser_name(experiment.pipeline), folder, sampling,
                origin(experiment, point.rate), measured)


def add_arguments(parser: cli.Parser) -> None:
    """The flags that measuring one rate and a sweep share."""
    parser.add_argument("--method", type=cli.name_in("method", METHODS), default="magnitude",
                        help="how to prune: " + "; ".join(f"{name}: {m.help}" for name, m in METHODS.items()))
    parser.add_argument("--dataset", type=cli.name_in("dataset", DATASETS), default="shapes",
                        help="captions and originals: " + "; ".join(f"{n}: {d.help}" for n, d in DATASETS.items()))
    parser.add_argument("--data_dir", type=Path, help="the data set's folder (default: fetched where it can be)")
    parser.add_argument("--model", help=f"{', '.join(pipelines.MODELS)}, a pipeline folder or a hub id (default: "
                                        f"shapes-unet for shapes, else {DATASETS['coco'].default_model})")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="chooses samples and noise")
    parser.add_argument("--seeds", type=cli.positive, default=1,
                        help="noise seeds: each sample is drawn so many times, and dense is compared with itself")
    parser.add_argument("--steps", type=cli.positive, help="denoising steps (default: the model's own)")
    parser.add_argument("--guidance_scale", type=float, help="(default: the model's own)")
    parser.add_argument("--image_size", type=cli.positive, help="pixels a side (default: the model's own)")
    parser.add_argument("--batch_size", type=cli.positive,
                        help="images made together (default: what the GPU has memory for; 8 on a CPU)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", type=cli.name_in("dtype", ("float32", "float16", "bfloat16")),
                        help="(default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--offload", type=cli.name_in("offload", pipelines.OFFLOADS),
                        help="keep parts that wait on the CPU: model by model, or sequential, layer by layer")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser; not in the times")
    parser.add_argument("--metrics", nargs="+", type=cli.name_in("metric", METRICS), default=list(METRICS),
                        help="what to measure")
    parser.add_argument("--metric_backbones", type=cli.name_in("metric backbones", BACKBONES),
                        help="networks behind the metrics, trained on shapes or the usual ones (default: by dataset)")
    parser.add_argument("--scope", type=cli.name_in("scope", ("layer", "global")),
                        help="magnitude, iterative: lowest |w| in each layer or over the denoiser "
                             f"(default: {METHODS['magnitude'].options['scope']})")
    parser.add_argument("--mask_only", action="store_true", default=None,
                        help="structured, attention_heads: zero in place and keep the shapes")
    parser.add_argument("--round_to", type=cli.positive,
                        help="structured: leave layers a multiple of so many units, as kernels may be slower at odd "
                             f"widths (default: {METHODS['structured'].options['round_to']})")
    parser.add_argument("--recovery_steps", type=cli.not_negative,
                        help="iterative: training steps after each step of pruning, 0 for none "
                             f"(default: {METHODS['iterative'].options['recovery_steps']})")
    cli.add_tolerance(parser)
    parser.add_argument("--save_pruned", type=Path, metavar="DIR",
                        help="keep the pruned pipeline as a folder that --model takes; several rates: in DIR/RATE")
    parser.add_argument("--discard_images", action="store_true",
                        help="keep on disk only the images that the figure shows; later metrics make them again")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where there is a record")
    parser.set_defaults(shard=None)


def main(argv=None) -> None:
    """Parse the command line, sweep, print where the record is."""
    parser = cli.Parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--num_images", type=cli.positive, default=32, help="images a rate")
    parser.add_argument("--rates", nargs="+", type=cli.rate, default=list(RATES), help="rates to measure")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "results", help="where records and graphs go")
    parser.add_argument("--shard", type=cli.shard, metavar="i/n",
                        help="measure every n-th rate from the i-th on, as a part for merge_results.py")
    args = parser.parse_args(argv)
    args.rates = sorted(set(args.rates))
    if args.shard:
        part, count = args.shard
        if count > len(args.rates):
            raise UserError(f"--shard {part}/{count}: there are but {len(args.rates)} rates to share out")
        args.rates = args.rates[part - 1::count]
    path = sweep(args)
    if not distributed.first:
        return
    record = read_record(path)
    print(summary(record, args.tolerance))
    print(path)
    print(answer(record, args.tolerance))


if __name__ == "__main__":
    cli.run(main)
