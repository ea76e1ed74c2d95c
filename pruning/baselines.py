"""How a baseline draws the images of an experiment: what it leaves out at a rate, and the context of each batch."""
from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, Optional

from pruning import distributed, methods
from pruning.experiment import Experiment, release
from pruning.methods import Pruned, calibration
from pruning.models import generation, pipelines


def drawing(experiment: Experiment, rate: float) -> ContextManager[Dict[str, Any]]:
    """Return a context in which a batch is drawn, and which yields the settings: those of all, or a baseline's."""
    method, pipeline = experiment.record.method, experiment.pipeline
    if method not in methods.BASELINES:
        return nullcontext(experiment.sampling)
    denoiser = getattr(pipeline, pipelines.denoiser_name(pipeline))
    return methods.file_of(method).drawing(denoiser, baseline_plan(experiment, rate), experiment.sampling)


@functools.lru_cache(maxsize=None)
def baseline_plan(experiment: Experiment, rate: float) -> Pruned:
    """Return what a baseline leaves out of each drawing at a rate."""
    return methods.file_of(experiment.record.method).plan(rate, experiment.sampling["steps"], magnitudes(experiment))


def magnitudes(experiment: Experiment) -> Optional[List[float]]:
    """Return what a baseline plans by, measured once on training captions; None if it needs no captions.

    All processes call this together. Raises UserError if the baseline cannot draw with this model.
    """
    if "captions" not in methods.needs(experiment.record.method, experiment.record.options):
        return None
    import torch  # here, because the commands import this file before they need torch
    own, pipeline, captions = methods.file_of(experiment.record.method), experiment.pipeline, experiment.training
    size = min(experiment.sampling["batch_size"], calibration.BATCH)
    draws = [functools.partial(generation.generate, pipeline, captions[start:start + size], **experiment.sampling)
             for start in range(0, len(captions), size)]

    def measure():
        denoiser = own.twin(experiment.dense)
        pipelines.set_denoiser(pipeline, denoiser, experiment.device, experiment.offload)
        found = own.magnitudes(pipeline, denoiser, draws)
        release(pipeline, experiment.dense, experiment.offload)
        return {"ratios": torch.tensor(found, dtype=torch.float64)}

    return distributed.broadcast(experiment.calibration.keep("magnitudes", measure)["ratios"].tolist())
