"""Measure what a record lacks, write it, and continue after a cut.

The function that measures a point is an argument, so that this file imports no command.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from pruning import UserError, cli, distributed, methods, whole_file
from pruning.baselines import baseline_plan
from pruning.data import DATASETS
from pruning.experiment import Experiment, checkpoint_file, prepare, release
from pruning.methods import variant_name
from pruning.metrics import costs
from pruning.models import pipelines, saving, signature
from pruning.progress import tqdm
from pruning.records import card, report, store
from pruning.records.findings import all_points, named
from pruning.records.grids import shown_images
from pruning.records.record import BrokenRecordError, Point, Record, read_record, record_path, write_record
from pruning.records.summaries import reach, setup
from pruning.records.words import counted, duration, rate_list
from pruning.steps import (
    copy_to_prune,
    image_file,
    image_provenance,
    load_images,
    prune_copy,
    pruned_origin,
    save_pruned,
)


def sweep(args, run_pruning_experiment: Callable[..., Optional[Point]]) -> Tuple[Path, Optional[Record]]:
    """Measure the dense model and every rate of args that the record lacks, then draw.

    Returns the record's path and, in the main process, the record. Raises UserError if something cannot be had,
    a record of other settings is in the way, or another process writes the record.
    """
    path = own_path(args)
    with distributed.main_first():
        earlier = None if args.overwrite else earlier_record(path)
    experiment = prepare(args, path, earlier)
    asked, args.rates = args.rates, reachable(experiment, args.rates, args.rates_by_default)
    experiment = noting_rates(experiment, set(args.all_rates or asked) - (set(asked) - set(args.rates)), earlier)
    known = {point.rate: point for point in (earlier.dense, *earlier.points)} if earlier else {}
    if not distributed.is_main:
        distributed.barrier()  # until all images are there that need not be made
        measure_all(experiment, args, path, known, run_pruning_experiment)
        return path, None
    with store.only_writer(path):
        if args.overwrite:
            if not args.shard:
                store.check_no_shard_is_written(path)
            delete_images(experiment, args)
        elif earlier_record(path) != earlier:
            raise UserError(f"another process has written {path} meanwhile: give the same command again")
        taken = 0 if args.overwrite and not args.dense_from else take_dense_images(experiment, args.dense_from)
        if taken:
            print(f"{counted(taken, 'image')} of the dense model {'is' if taken == 1 else 'are'} taken from other "
                  f"sweeps in {cli.near(path.parent)}", file=sys.stderr)
        distributed.barrier()
        try:
            measure_all(experiment, args, path, known, run_pruning_experiment)
        finally:
            # Also after Ctrl-C: finished points are worth a look. Without any, the file is an earlier run's.
            record = read_record(path) if known and path.exists() else None
            if record and not args.shard:
                report.write_record_files(record, path.parent, experiment.images_folder, args.tolerance)
                report.remake_report(path, record, args.tolerance)
            for rate, folder in saved_folders(args).items() if record else ():
                if folder.is_dir() and rate in [point.rate for point in all_points(record)]:
                    card.write(record, rate, folder, experiment.images_folder, signature.as_code(
                        type(experiment.pipeline), record.samples[0]["caption"], record.settings["steps"],
                        record.settings["guidance_scale"]), args.tolerance)
            if args.discard_images:
                for point in [record.dense, *record.points] if record else ():
                    discard_images(experiment, point.rate, shown_images(record, args.tolerance))
    if record and reach(record):
        print(reach(record), file=sys.stderr)
    return path, record


def baseline_arguments(args) -> List[argparse.Namespace]:
    """Return the arguments of the sweep of each of args.baselines, which follow the sweep of args.method.

    A baseline has the same rates and flags but for the method's own, and starts from the same dense images. Raises
    UserError if one of them is not possible for this model.
    """
    own_flags = dict.fromkeys(option for entry in methods.METHODS.values() for option in entry.options)
    made = [argparse.Namespace(**{**vars(args), **own_flags, "method": name, "save_pruned": None,
                                  "rates_by_default": True, "dense_from": own_variant(args)})
            for name in dict.fromkeys(args.baselines or ())]
    for own in made:
        cli.check_flags(own)
    limited = [own.method for own in made if methods.METHODS[own.method].limited]
    if limited:
        from pruning.models import skeleton  # here, because the commands import this file before they need torch
        model = args.model or DATASETS[args.dataset].default_model
        found = skeleton.load(model)
        guidance = skeleton.sampling(found, {"guidance_scale": args.guidance_scale}, model)["guidance_scale"]
        for name in limited:
            why = methods.why_not(name, found, guidance)
            if why:
                raise UserError(f"{name} is not possible here: {why}; leave {name} out of --baselines")
    return made


def noting_rates(experiment: Experiment, rates: set, earlier: Optional[Record]) -> Experiment:
    """Return the experiment with the rates of the sweep, of all its shards, in the notes of its record."""
    rates = rates | set(earlier.notes.rates if earlier else ())
    notes = replace(experiment.record.notes, rates=sorted(rate for rate in rates if rate))
    return replace(experiment, record=replace(experiment.record, notes=notes))


def reachable(experiment: Experiment, rates: List[float], by_default: bool) -> List[float]:
    """Return the rates that the method can reach.

    Of the rates of a default sweep, others are left out with a message. Raises UserError if rates that were asked for
    cannot be reached.
    """
    if experiment.record.method in methods.BASELINES:
        beyond, said = without_a_drawing(experiment, rates)
    else:
        limit = distributed.broadcast(largest_rate(experiment))
        beyond = [rate for rate in rates if rate > limit]
        said = (f"{experiment.record.method} reaches rate {limit:.3f} at most on this model, where nothing that it "
                "could remove is left")
    if not beyond:
        return rates
    if not by_default:
        raise UserError(f"{said}; leave out {', '.join(f'{rate:g}' for rate in beyond)}")
    if distributed.is_main:
        print(f"{said}: {', '.join(f'{rate:g}' for rate in beyond)} are left out", file=sys.stderr)
    return [rate for rate in rates if rate not in beyond]


def without_a_drawing(experiment: Experiment, rates: List[float]) -> Tuple[List[float], str]:
    """Return the rates at which a baseline has no drawing of its own, and why in words."""
    beyond, why, known = [], [], {0: 0.0}
    for rate in rates:
        plan = baseline_plan(experiment, rate)
        if plan.taken != plan.asked:
            why.append(f"no setting leaves out exactly {plan.asked} of the {plan.total} {plan.unit}, rate {rate:g}")
        elif rate and plan.taken in known:
            why.append(f"rate {rate:g} leaves out {plan.taken} of the {plan.total} {plan.unit}, as "
                       f"{rate_list([known[plan.taken]])} does")
        else:
            known[plan.taken] = rate
            continue
        beyond.append(rate)
    return beyond, f"{experiment.record.method}: {'; '.join(why)}"


def largest_rate(experiment: Experiment) -> float:
    """Return the largest rate that the method can reach on the dense denoiser.

    Raises UserError if the denoiser has nothing that a limited method prunes.
    """
    if not methods.METHODS[experiment.record.method].limited:
        return 1.0
    pipelines.set_denoiser(experiment.pipeline, experiment.dense, experiment.device, experiment.offload)
    limit = methods.largest_rate(experiment.record.method, experiment.dense, experiment.single_call,
                                 **experiment.record.options)
    release(experiment.pipeline, experiment.dense, experiment.offload)
    return limit


def measure_all(experiment: Experiment, args, path: Path, known: Dict[float, Point],
                run_pruning_experiment: Callable[..., Optional[Point]]) -> None:
    """Measure the points and the metrics that are not in `known` (rate -> point), add them there, write the record.

    The record is written after each point.
    """
    folders = saved_folders(args)
    # The main process decides for all, as files change while the others look.
    unsaved = distributed.broadcast({rate for rate in folders if not saving.is_saved(
        folders[rate], pruned_origin(experiment.record, rate))})
    for rate in unsaved if distributed.is_main else ():
        saving.check_room(folders[rate], least_bytes(experiment))
    todo = missing_points(experiment, args.rates, known)
    chosen, untimed = set(experiment.record.settings["metrics"]), True

    def on_batch(count: int, seconds_each: float) -> None:
        nonlocal untimed
        if untimed and to_make and distributed.is_main:
            seconds = seconds_each * to_make / distributed.world_size
            tqdm.write(f"{counted(to_make, 'image')} take about {duration(seconds)} by the first batch; calibration, "
                       "pruning, timing and metrics come on top", file=sys.stderr)
        untimed = False
        bar.update(count)

    def measure(rate: float, again: bool) -> None:
        bar.set_description(f"{experiment.record.variant} {rate:g}" if rate else "dense")
        save_to = folders[rate] if rate in unsaved else None
        known[rate] = run_pruning_experiment(experiment, rate, known.get(0.0) if rate else None,
                                             known.get(rate) if again else None, save_to, on_batch)
        unsaved.discard(rate)

    def write() -> None:
        # All points of a record have the same metrics: it is written when no point lacks one.
        if distributed.is_main and all(set(point.metrics) == chosen for point in known.values()):
            first, *points = (known[rate] for rate in sorted(known))
            write_record(replace(experiment.record, dense=first, points=points), path)

    to_make = len(experiment.samples) * sum(not again for _, again in todo)
    if todo and distributed.is_main:
        print(f"{named(experiment.record)} on {experiment.device}: "
              f"{rate_list([rate for rate, _ in todo])}, {setup(experiment.record)}\n"
              f"Written to {cli.near(path.parent)}", file=sys.stderr)

    with tqdm(total=len(todo) * len(experiment.samples), unit="image",
              disable=not (todo and distributed.is_main)) as bar:
        for rate, again in todo:
            measure(rate, again)
            write()
            if args.discard_images and distributed.is_main and rate:
                so_far = replace(experiment.record, dense=known[0.0], points=[known[rate]])
                discard_images(experiment, rate, shown_images(so_far, args.tolerance))
    for rate in sorted(unsaved):  # measured by an earlier run that did not save it
        denoiser, _ = prune_copy(experiment, rate)  # all processes together
        if distributed.is_main:
            save_pruned(experiment, denoiser, folders[rate], known[rate])
    if distributed.is_main:
        with suppress(FileNotFoundError):
            checkpoint_file(path).unlink()


def least_bytes(experiment: Experiment) -> int:
    """Return how many bytes a pruned pipeline takes on disk while it is written, at least."""
    import torch  # here, because the commands import this file before they need torch
    removes = methods.METHODS[experiment.record.method].removes and not experiment.record.options.get("mask_only")
    parts = [part for part in experiment.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    kept = [part for part in parts if part is not getattr(experiment.pipeline, pipelines.denoiser_name(
        experiment.pipeline))] + ([] if removes else [experiment.dense])
    return sum(tensor.numel() * tensor.element_size() for part in kept for tensor in part.state_dict().values())


def missing_points(experiment: Experiment, rates: List[float], known: Dict[float, Point]) -> List[Tuple[float, bool]]:
    """Return what to measure, in order, as (rate, whether only its metrics): first known points, then missing rates.

    Known points are measured again if they lack a metric. Their images are read from disk, or made again if one
    is missing there. The dense model's images are needed whenever another point is measured.
    """
    chosen = set(experiment.record.settings["metrics"])
    lacking = any(set(point.metrics) != chosen for point in known.values())
    missing = [(rate, False) for rate in sorted({0.0, *rates} - set(known))]
    again = sorted(known) if lacking else [0.0] if missing and 0.0 in known else []
    again = [(rate, load_images(experiment, rate) is not None) for rate in again]
    return [*(pair for pair in again if lacking or not pair[1]), *missing]


def earlier_record(path: Path) -> Optional[Record]:
    """Return the record at `path`, or None if there is none. A broken file is set aside under another name."""
    try:
        return read_record(path) if path.exists() else None
    except BrokenRecordError as error:
        print(f"{error}; {store.set_aside(path)}, and its rates are measured again from the images", file=sys.stderr)
        return None


def measure_sensitivity(args) -> Tuple[Path, dict]:
    """Measure how much the guided output changes if one layer alone is pruned by args.method. No image is measured.

    Writes a JSON file, a figure, a text and, if there is a record of these arguments, the report, which then shows it
    too. Returns the path of the JSON file and what it holds. Raises UserError if the method does not prune layer by
    layer, or if something cannot be had.
    """
    if distributed.world_size > 1:
        raise UserError("--sensitivity runs in one process; start it without a launcher")
    if getattr(args, "pattern", None):
        raise UserError(f"--sensitivity measures layers at several rates, and --pattern {args.pattern} has one; leave "
                        "out --pattern")
    args.metrics, path = [], own_path(args)
    experiment = prepare(args, path, None)
    denoiser = copy_to_prune(experiment, calibrates=True)
    options = experiment.record.options
    rates, survey = methods.survey(args.method, denoiser, experiment.calibration, **options)
    pipelines.set_denoiser(experiment.pipeline, denoiser, experiment.device, experiment.offload)
    shares = costs.layer_shares(denoiser, experiment.single_call)
    layers = {name: {"sensitivity": survey.sensitivities[name], "error": survey.curves[name][1:],
                     "change": [survey.sensitivities[name] * error for error in survey.curves[name][1:]],
                     "parameters": shares["layer_parameters"][name], "macs": shares["layer_macs"][name]}
              for name in survey.curves}
    found = {"model": experiment.record.model, "dataset": args.dataset, "variant": experiment.record.variant,
             "images": options["calibration_images"], "settings": experiment.record.settings,
             "versions": experiment.record.versions, "rates": list(rates), "layers": layers}
    written, record = report.write_sensitivity(found, path.parent), earlier_record(path)
    if record:
        report.remake_report(path, record, args.tolerance)
    return written, found


def own_path(args) -> Path:
    """Return the path of the record of these arguments."""
    model = args.model or DATASETS[args.dataset].default_model
    return record_path(args.results_dir, pipelines.label(model), args.dataset, own_variant(args), args.shard)


def own_variant(args) -> str:
    """Return the variant of these arguments."""
    return variant_name(args.method, cli.method_options(args))


def delete_images(experiment: Experiment, args) -> None:
    """Delete the images of earlier runs. A shard deletes those of its own rates: other shards may be running."""
    rates = args.rates if args.shard else None
    folders = [image_file(experiment, rate, 0).parent for rate in rates] if rates \
        else [image_file(experiment, 0.0, 0).parents[1]]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def take_dense_images(experiment: Experiment, variant: Optional[str] = None) -> int:
    """Take the dense model's images that are missing from other variants that drew them alike; return how many.

    variant: take them from this one alone.
    """
    others = [variant] if variant else sorted({path.name for path in experiment.images_folder.glob("*")}
                                              - {experiment.record.variant})
    taken = 0
    for index in range(len(experiment.samples)):
        own, origin = image_file(experiment, 0.0, index), image_provenance(experiment, 0.0, index)
        if store.made_by(own, origin):
            continue
        found = [store.image_file(experiment.images_folder, each, 0.0, index) for each in others]
        source = next((path for path in found if store.made_by(path, origin)), None)
        if source:
            with whole_file(own, sync=False) as part:
                store.link(source, part)
            taken += 1
    return taken


def discard_images(experiment: Experiment, rate: float, shown: List[int]) -> None:
    """Delete the images of a rate that no figure shows."""
    for index in set(range(len(experiment.samples))) - set(shown):
        with suppress(FileNotFoundError):
            image_file(experiment, rate, index).unlink()


def saved_folders(args) -> Dict[float, Path]:
    """Return the folder of each rate's pruned pipeline: --save_pruned itself, or for several rates a folder in it."""
    if args.save_pruned is None:
        return {}
    if len(args.rates) == 1:
        return {args.rates[0]: args.save_pruned}
    return {rate: args.save_pruned / store.rate_folder(rate) for rate in args.rates}
