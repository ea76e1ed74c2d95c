"""What all points of a record share, made once: samples, pipeline, networks, calibration, and the record's settings."""
from __future__ import annotations

import functools
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from pruning import UserError, cache_folder, cli, data, distributed, methods, originals
from pruning.data import DATASETS, Sample
from pruning.data.faults import Faults, note, tell
from pruning.methods import calibration
from pruning.methods.calibration import GIB, Calibration
from pruning.methods.options import check_together
from pruning.metrics import BACKBONES, DEFAULT, METRICS, backbones, check_networks, costs, scores
from pruning.models import generation, pipelines, provenance
from pruning.models.hub import first_line
from pruning.progress import status, tqdm
from pruning.records.record import Notes, Record, protocol_differences
from pruning.records.words import listed

VISITED = 32  # captions that a denoiser draws at once to recover on
SAMPLED_STEPS = 6  # by which methods that ask for final latents judge


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all points of a record share. `prepare` makes it once, and nothing assigns to it afterwards.

    No image is in it: originals are read, and generated images come from disk, for a block of samples at a time.
    """

    record: Record  # settings, samples, versions; without points
    images_folder: Path
    pipeline: Any  # each point puts its own denoiser into it
    dense: Any  # the dense denoiser: its weights never change; on the CPU unless it runs
    device: str
    offload: Optional[str]  # one of pipelines.OFFLOADS
    sampling: Dict[str, Any]  # keyword arguments of generation.generate
    samples: List[Sample]  # those of the record, once for each noise seed
    networks: Dict[str, Any]  # family of backbones -> network
    caption_embeddings: Dict[str, np.ndarray]  # family of CLIP models -> (the record's samples, d), if a metric asks
    reference: Dict[str, scores.Reference]  # family -> features of the real images; in the main process alone
    floor_features: Dict[str, np.ndarray]  # family -> features of as many other real images, {} if there are none
    calibration: Optional[Calibration]  # if the method asks for one
    training: List[Sample]  # captions that are never measured, which it draws to calibrate on
    timed: Dict[tuple, tuple] = field(default_factory=dict)  # shapes of a denoiser's tensors -> steps.time_beside_dense

    @property
    def batches(self) -> List[range]:
        """The positions of the samples, batch by batch. Batches do not depend on the number of processes."""
        size, count = self.sampling["batch_size"], len(self.samples)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def originals(self, rows: Sequence[int]) -> np.ndarray:
        """Return the original images of the samples at these positions, uint8 (len(rows), size, size, 3)."""
        return data.load_originals([self.samples[row] for row in rows], self.sampling["image_size"])

    def captions(self, rows: Sequence[int], family: str = "clip") -> np.ndarray:
        """Return a CLIP model's embeddings of the captions of the samples at these positions, (len(rows), d)."""
        embeddings = self.caption_embeddings[family]
        return embeddings[np.array(rows) % len(embeddings)]

    @functools.lru_cache(maxsize=None)  # noqa: B019 - an experiment lives as long as its command
    def call(self, size: int) -> dict:
        """Keyword arguments of a denoiser call for `size` images. The pipeline passes the same at every rate."""
        return generation.first_call(self.pipeline, self.samples[:size], **self.sampling)

    @property
    def batch_call(self) -> dict:
        """Keyword arguments of a denoiser call for a batch."""
        return self.call(len(self.batches[0]))

    @property
    def single_call(self) -> dict:
        """Keyword arguments of a denoiser call for one image."""
        return self.call(1)

    @functools.lru_cache(maxsize=None)  # noqa: B019 - the same
    def call_costs(self, shapes: tuple) -> Dict[str, int]:
        """The macs and peak_bytes of a call of the pipeline's denoiser, whose tensors have these shapes."""
        denoiser = getattr(self.pipeline, pipelines.denoiser_name(self.pipeline))
        return {"macs": costs.count_macs(denoiser, self.single_call),
                "peak_bytes": costs.peak_bytes(denoiser, self.single_call)}


# ---- preparation

def prepare(args, path: Path, earlier: Optional[Record]) -> Experiment:
    """Load everything that the points share. What can fail first comes first.

    path: of the record, beside which the images lie. earlier: the record of an earlier run that this run continues.
    Raises UserError if something cannot be had, or if `earlier` was measured with other settings.
    """
    options = cli.method_options(args)
    check_together(options, args.rates)
    cli.check_flags(args)
    status("importing torch, diffusers and transformers")
    device = distributed.own_device(pipelines.pick_device(args.device))
    if args.offload and device == "cpu":
        raise UserError(f"--offload {args.offload} needs a GPU; on the CPU there is nothing to offload")
    if device == "cpu":
        generation.keep_freed_memory()
    with distributed.main_first():
        samples, faults = data.load_samples(args.dataset, args.num_images, args.seed, args.data_dir)
    chosen, left_out = choose_metrics(args, earlier)
    faults = {**faults, **left_out}
    tell(faults)
    captions = training_captions(args, samples)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    model = args.model or DATASETS[args.dataset].default_model
    kind = args.metric_backbones or DATASETS[args.dataset].backbones
    families = {name: METRICS[name].backbone for name in chosen if METRICS[name].backbone}
    status("loading the networks of the metrics")
    with distributed.main_first():
        networks = {family: backbones.load_backbone(kind, family, device)
                    for family in dict.fromkeys(families.values())}
    status(f"loading {model}")
    unused: Faults = {}
    with distributed.main_first():
        pipeline = pipelines.load_pipeline(model, "cpu" if args.offload else device, dtype, unused)
    tell(unused)
    generation.remember_prompts(pipeline)
    dense = pipelines.take_denoiser(pipeline)
    methods.check_weights(dense)
    methods.check_memory(args.method, dense, int(args.calibration_memory * GIB),
                         "cpu" if args.offload else device, **options)
    sampling = {"seed": args.seed, **pipelines.sampling_settings(pipeline, model, {
        name: getattr(args, name) for name in ("steps", "guidance_scale", "image_size")})}
    rehearse(pipeline, dense, samples[0], device, args.offload, sampling, networks, chosen)
    asked = args.batch_size or (earlier and earlier.settings.get("batch_size"))
    sampling["batch_size"] = choose_batch_size(pipeline, dense, samples[0], args.seeds * len(samples), device,
                                               args.offload, sampling, asked)

    hashed = originals.content_hash(samples if DATASETS[args.dataset].originals else [], sampling["image_size"])
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
                  "configs": provenance.fingerprint_configs(pipeline),
                  "originals": hashed,
                  "dtype": dtype, "compile": args.compile, "offload": args.offload,
                  **distributed.broadcast(provenance.machine(device))},
        backbones={name: described[family] for name, family in families.items() if family in described},
        notes=None, versions=provenance.package_versions(), dense=None, points=[])
    if earlier:
        check_continues(earlier, record, path)  # before the real images are read

    embedded = {family: backbones.embed_captions(network, [sample.caption for sample in samples])
                for family, network in networks.items() if isinstance(network, backbones.Clip)}
    sets = sorted({families[name] for name in chosen if METRICS[name].against == "reference" and distributed.is_main})
    real = data.reference_samples(args.dataset, samples, args.data_dir) if sets else []
    others, found = data.other_samples(args.dataset, samples, args.seed, args.data_dir) if sets else ([], {})
    for index in sorted({index for _, cut in embedded.values() for index in cut}):
        note(found, "Captions cut where CLIP stops reading", samples[index].id)
    for index in networks["reward"].truncated([sample.caption for sample in samples]) if "reward" in networks else ():
        note(found, "Captions cut where ImageReward stops reading", samples[index].id)
    tell(found)
    describe = functools.partial(originals.describe, {family: networks[family] for family in sets}, described,
                                 record.versions, device, sampling["image_size"])
    reference, reference_hash = describe(real)
    floors, others_hash = describe(others)
    hashes = {"reference_originals": reference_hash, "other_originals": others_hash} if sets else {}
    if earlier:  # a record of an earlier version does not know its real images, nor does it once it has gone on
        hashes.update((name, "unknown") for name in hashes if earlier.settings.get(name) == "unknown")
    record = replace(record, settings={**record.settings, **hashes})
    if earlier:
        check_continues(earlier, record, path)
    code = [*(earlier.notes.code if earlier else []), provenance.code_version()]
    notes = Notes(faults={**faults, **unused, **found}, code=list(dict.fromkeys(code)), reference_images=len(real),
                  feature_sizes={family: features.shape[1] for family, features in reference.items()})

    folder, few = calibration_folder(record, captions), min(sampling["batch_size"], calibration.BATCH, len(captions))
    other_call = folder / "other.pt"
    drawn = [Sample(f"recovery-{i:05d}", caption, None) for i, caption in enumerate(captions)]

    def sample(denoiser, count: int):
        """Return the final latents that a denoiser draws of `count` training captions, in few steps."""
        import torch  # here, because the commands import this file before they need torch
        place = denoiser.device
        pipelines.set_denoiser(pipeline, denoiser, device, args.offload)
        settings = {name: sampling[name] for name in ("seed", "guidance_scale", "image_size")}
        made = [generation.final_latents(pipeline, drawn[start:min(start + sampling["batch_size"], count)],
                                         steps=min(SAMPLED_STEPS, sampling["steps"]), **settings)
                for start in range(0, min(count, len(drawn)), sampling["batch_size"])]
        if args.offload:
            release(pipeline, denoiser, args.offload)
            denoiser.to(place)
        return torch.cat(made)

    def batches(name: str, captions: List[Sample]) -> Dict[Path, List[Sample]]:
        """Return the files of the calls for these captions, and which captions are in each."""
        return {folder / f"{name}-{start}.pt": captions[start:start + few] for start in range(0, len(captions), few)}

    def record_calls() -> list:
        """Return the dense denoiser's calls while it draws the training captions, a file a batch.

        One more file holds a call for another number of images.
        """
        files = batches("calls", drawn)

        def record(paths):
            pipelines.set_denoiser(pipeline, dense, device, args.offload)
            for path in tqdm(paths, desc="calibration images", unit="batch", disable=not distributed.is_main):
                keep = calibration.keep_once()
                if path == other_call:
                    images = drawn[:1] * (2 if few == 1 else 1)
                    yield path, [(keep(generation.first_call(pipeline, images, **sampling)), None)]
                else:
                    yield path, generation.record_calls(pipeline, files[path], keep, **sampling)
            release(pipeline, dense, args.offload)
        return calibration.recorded([*files, other_call], record)[:-1]

    @contextmanager
    def visit(denoiser, number: int):
        """Yield the calls of a copy of a denoiser while it draws VISITED training captions, with dense's samples.

        The calls are in files that are removed after the block.
        """
        import torch  # here, because the commands import this file before they need torch
        files = batches(f"visit-{number}-{provenance.fingerprint(denoiser).split()[-1]}", [
            drawn[(number * VISITED + place) % len(drawn)] for place in range(min(VISITED, len(drawn)))])

        def record(paths):
            place, drawer = denoiser.device, pipelines.copy_to(denoiser, denoiser.device).to(dense.dtype)
            for path in tqdm(paths, desc="images to recover on", unit="batch", leave=False,
                             disable=not distributed.is_main):
                pipelines.set_denoiser(pipeline, drawer, device, args.offload)
                calls = generation.record_calls(pipeline, files[path], calibration.keep_once(),
                                                **{**sampling, "seed": sampling["seed"] + number})
                release(pipeline, drawer, args.offload)
                with pipelines.lent_to(dense, place), torch.no_grad():
                    calls = [(arguments, calibration.answer(dense, arguments).cpu()) for arguments, _ in calls]
                yield path, calls
            pipelines.set_denoiser(pipeline, dense)  # lets go of the copy

        try:
            yield calibration.recorded(list(files), record)
            distributed.barrier()  # until no process reads them
        finally:
            for path in files if distributed.is_main else ():
                with suppress(OSError):
                    path.unlink()

    return Experiment(
        record=replace(record, notes=notes), images_folder=path.parent / "images", pipeline=pipeline, dense=dense,
        device=device, offload=args.offload, sampling=sampling, samples=repeated,
        networks=networks, caption_embeddings={family: embeddings for family, (embeddings, _) in embedded.items()},
        reference={family: scores.Reference(features) for family, features in reference.items()}, floor_features=floors,
        training=drawn, calibration=calibration.Calibration(
            record_calls, args.seed, checkpoint=checkpoint_file(path), guidance_scale=sampling["guidance_scale"],
            first_batch=few, memory=int(args.calibration_memory * GIB), folder=folder,
            sample=sample, visit=visit, recompute=args.gradient_checkpointing,
            lend=functools.partial(pipelines.lent_to_teach, dense),
            other=lambda: calibration.read_calls(other_call)[0][0]) if captions else None)


def choose_metrics(args, earlier: Optional[Record]) -> Tuple[List[str], Faults]:
    """Return the metrics to measure, of all points alike, and what is left out because the data set has no originals.

    Optional metrics are measured if they are asked for. Raises UserError if a metric is asked for that needs originals
    which the data set does not have, or a network that the chosen backbones do not have.
    """
    asked, needy = args.metrics, [] if DATASETS[args.dataset].originals else \
        [name for name, metric in METRICS.items() if metric.needs_originals]
    refused = [name for name in needy if name in (asked or ())]
    if refused:
        raise UserError(f"{args.dataset} has no original images to compare with by {listed(refused)}: give other "
                        "--metrics or another --dataset")
    check_networks(asked or (), args.metric_backbones or DATASETS[args.dataset].backbones)
    wanted = set(DEFAULT if asked is None else asked) - set(needy) | set(earlier.settings["metrics"] if earlier else ())
    why = f"Metrics left out because {args.dataset} has no original images"
    left_out = {why: {"count": len(needy), "first": needy}} if needy and asked is None else {}
    return [name for name in METRICS if name in wanted], left_out


def training_captions(args, samples: List[Sample]) -> List[str]:
    """Return the captions that the method calibrates on, none of them measured; [] if the method does not calibrate."""
    options = cli.method_options(args)
    if not (methods.needs(args.method, options) or args.sensitivity and "calibration_images" in options):
        return []
    return data.training_captions(args.dataset, options["calibration_images"], args.seed, args.data_dir, samples)


def calibration_folder(record: Record, captions: List[str]) -> Path:
    """Return the folder of what is computed from the recorded calls, which all records share that make equal calls."""
    sampled = {name: record.settings[name] for name in (
        "seed", "steps", "guidance_scale", "image_size", "dtype", "device", "pipeline", "configs",
        "denoiser")}
    packages = {name: record.versions[name] for name in ("torch", "diffusers", "transformers")}
    return cache_folder() / "calibration" / provenance.provenance_hash(
        **sampled, **packages, batch_size=min(record.settings["batch_size"], calibration.BATCH), captions=captions,
        code=provenance.folder_hash(Path(methods.__file__).parent))


def checkpoint_file(path: Path) -> Path:
    """Return the file in which a method may keep its state until the sweep that writes `path` is finished."""
    return path.with_suffix(".checkpoint.safetensors")


def check_continues(earlier: Record, record: Record, path: Path) -> None:
    """Raise UserError with the differences if `record` does not continue `earlier`. Other metrics are no difference."""
    differences = protocol_differences(earlier, record, continuing=True)
    if differences:
        raise UserError(f"{path} was measured with other settings ({'; '.join(differences)}): "
                        "use the same settings, another --results_dir, or --overwrite to start afresh")


def rehearse(pipeline, dense, sample: Sample, device: str, offload: Optional[str], sampling: dict, networks,
             metrics: List[str]) -> None:
    """Raise UserError if the pipeline cannot make an image with these settings, or a metric cannot measure it."""
    size = sampling["image_size"]
    blank = np.zeros((1, size, size, 3), np.uint8)
    apart = {"lpips": lambda network: scores.lpips(network, blank, blank),
             "reward": lambda network: scores.image_reward(network, blank, [sample.caption])}
    tries = {f"the {family} network": functools.partial(apart[family], network) if family in apart else
             functools.partial(backbones.describe, family, network, blank) for family, network in networks.items()}
    if "ssim_dense" in metrics:
        tries["ssim_dense"] = functools.partial(scores.ssim, blank, blank, device)
    for name, measure in tries.items():
        try:
            measure()
        except Exception as error:  # torch names layers and kernels
            raise UserError(f"{name} cannot measure images of {size} pixels a side; give another --image_size "
                            f"({first_line(error)})") from error
    pipelines.set_denoiser(pipeline, dense, device, offload)
    generation.check_makes_images(pipeline, sample, **sampling, batch_size=1)
    release(pipeline, dense, offload)


def choose_batch_size(pipeline, dense, sample: Sample, count: int, device: str, offload: Optional[str],
                      sampling: dict, asked: Optional[int]) -> int:
    """Return the batch size that suits the device and `count` images, the same in all processes.

    asked: the user's, or that of the record that goes on.
    """
    pipelines.set_denoiser(pipeline, dense, device, offload)
    size = generation.fitting_batch_size(pipeline, sample, count, device, asked, **{
        name: sampling[name] for name in ("steps", "guidance_scale", "image_size")})
    release(pipeline, dense, offload)
    return min(distributed.gather([size]))


def release(pipeline, denoiser, offload: Optional[str]) -> None:
    """Bring a denoiser back to the CPU, with its values, after the pipeline has used it."""
    if offload:
        pipeline.remove_all_hooks()
    denoiser.to("cpu")
