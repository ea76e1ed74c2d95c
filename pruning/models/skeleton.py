"""A pipeline without weights: its components on the meta device, made from configs alone."""
from __future__ import annotations

import inspect
import math
import time
from logging import CRITICAL
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from pruning import UserError
from pruning.models import hub, pipelines, saving

UNSAID, STEPS = 1024, 50  # pixels a side and steps, if nothing says them
CLIP_TOKENS = 77  # of a caption
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "_context", "txt_")  # in names of layers for text


class Skeleton(NamedTuple):
    """What a pipeline's configs say."""

    pipeline: type
    denoiser: str  # the component that is pruned
    parts: Dict[str, Any]  # component -> module on the meta device
    configs: Dict[str, Dict[str, Any]]  # component -> its config
    unknown: Dict[str, str]  # component -> why it cannot be made


def load(model: str) -> Skeleton:
    """Read the configs of a bundled model, a pipeline folder or a hub id; no weights are fetched.

    Raises UserError if there is no such model, if it is no text-to-image pipeline, or if its denoiser cannot be made
    of its config.
    """
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity(CRITICAL)
    source = pipelines.model_source(model)
    folder = Path(source).is_dir()
    manifest = saving.read_manifest(Path(source)) if folder else None
    with pipelines.reading(f"model {model!r}") if folder else hub.asking(f"cannot read model {model!r}", model):
        index = dict(diffusers.DiffusionPipeline.load_config(source))
    pipelines.check_class(index)
    name = next((name for name in saving.DENOISERS if (index.get(name) or [None])[0]), None)
    if name is None:
        raise UserError(f"{index['_class_name']} has neither a unet nor a transformer to prune")
    parts, configs, unknown = {}, {}, {}
    for part, value in index.items():
        if not (isinstance(value, (list, tuple)) and len(value) == 2 and value[1]):
            continue
        pruned = manifest and part == name
        try:
            made = saving.empty_denoiser(Path(source), manifest) if pruned else _component(source, part, *value)
        except Exception as error:  # each class fails in its own way
            unknown[part] = hub.first_line(error)
            continue
        if made is not None:
            parts[part], configs[part] = made, dict(getattr(made.config, "to_dict", lambda c=made.config: c)())
    if name in unknown:
        raise UserError(f"the {name} of model {model!r} cannot be made of its config: {unknown[name]}")
    return Skeleton(getattr(diffusers, index["_class_name"]), name, parts, configs, unknown)


def _component(source: str, part: str, library: str, kind: str) -> Optional[Any]:
    """Return a component on the meta device, or None if it has no weights."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    made = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if not isinstance(made, type):
        raise ValueError(f"this environment has no {library}.{kind}")
    with init_empty_weights(include_buffers=True):
        if issubclass(made, diffusers.ModelMixin):
            return made.from_config(made.load_config(source, subfolder=part)).eval()
        if issubclass(made, transformers.PreTrainedModel):
            return made(made.config_class.from_pretrained(source, subfolder=part))
    return None


def sampling(found: Skeleton, given: Dict[str, Any], model: str) -> Dict[str, Any]:
    """Return steps, guidance_scale and image_size, as given or as the pipeline's class and configs say."""
    size = found.configs[found.denoiser].get("sample_size")
    said = size * shrinks(found) if isinstance(size, int) else pipelines.default_size(found.pipeline)
    own = {"image_size": said or UNSAID, **pipelines.own_settings(found.pipeline, model)}
    own["steps"] = own["steps"] or STEPS
    return {**own, **{name: value for name, value in given.items() if value is not None}}


def guides_twice(found: Skeleton) -> bool:
    """Return whether the denoiser is called for caption and no caption, and does not read the guidance scale itself."""
    return not found.configs[found.denoiser].get("guidance_embeds")


def shrinks(found: Skeleton) -> int:
    """Return how many pixels a side a latent stands for."""
    vae = found.configs.get("vae", {})
    widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    return 2 ** (len(widths) - 1)


def count_macs(found: Skeleton, image_size: int) -> float:
    """Return about how many multiply-accumulates a call of the denoiser takes for one latent.

    UNet2DConditionModel is counted exactly, in a call without values. For transformers see transformer_macs.
    """
    from pruning.metrics import costs

    denoiser, config = found.parts[found.denoiser], found.configs[found.denoiser]
    side = image_size // shrinks(found)
    if type(denoiser).__name__ == "UNet2DConditionModel":
        return costs.count_macs(denoiser, _unet_call(config, side))
    patch = config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    if config.get("in_channels") == 4 * found.configs.get("vae", {}).get("latent_channels", math.nan):
        patch *= 2  # the pipeline packs 2 x 2 latents in a token
    return transformer_macs(denoiser, (side // patch) ** 2, prompt_tokens(found))


def prompt_tokens(found: Skeleton) -> int:
    """Return how many tokens of a caption the pipeline passes at most."""
    longest = inspect.signature(found.pipeline.__call__).parameters.get("max_sequence_length")
    return longest.default if longest and isinstance(longest.default, int) else CLIP_TOKENS


def transformer_macs(denoiser, image: int, text: int) -> float:
    """Return about how many multiply-accumulates a transformer's call on so many tokens of image and text takes.

    In a block with layers for the text alone, the others read the image alone; other blocks read all tokens. AdaLN
    layers and embeddings count nothing, and all tokens attend to each other.
    """
    from torch import nn

    from pruning.methods import ranks, surgery

    once = {id(layer) for layer in ranks.modulation_layers(denoiser).values()}
    layers = {name: layer for name, layer in denoiser.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d)) and id(layer) not in once and "embed" not in name}
    of_text = {name for name in layers if any(mark in name for mark in OF_TEXT)}
    with_both = {_block(name) for name in of_text}
    macs = 0
    for name, layer in layers.items():
        tokens = text if name in of_text else image if _block(name) in with_both else image + text
        macs += layer.weight.numel() * tokens
    heads, _ = surgery.find_groups(denoiser, ("heads",))
    return macs + sum(2 * (image + text) ** 2 * group.inner for group in heads)


def _block(name: str) -> str:
    """Return the name of the block that a layer lies in: all up to the first number."""
    parts = name.split(".")
    return ".".join(parts[:next((place for place, part in enumerate(parts) if part.isdigit()), 0) + 1])


def _unet_call(config: Dict[str, Any], side: int) -> Dict[str, Any]:
    """Return the keyword arguments of a call of a UNet2DConditionModel, without values."""
    import torch

    def empty(*shape):
        return torch.empty(shape, device="meta")

    width = config["cross_attention_dim"]
    call = {"sample": empty(1, config["in_channels"], side, side), "timestep": empty(1),
            "encoder_hidden_states": empty(1, CLIP_TOKENS, width if isinstance(width, int) else max(width))}
    if config.get("addition_embed_type") == "text_time":
        call["added_cond_kwargs"] = {"time_ids": empty(1, 6), "text_embeds": empty(
            1, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])}
    return call


def macs_a_second(device: str, dtype: str) -> float:
    """Return how many multiply-accumulates a second a product of large matrices makes: the best of some rounds."""
    import torch

    from pruning.metrics.costs import synchronize

    size = 2048 if device == "cpu" else 8192
    one = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(5):
        synchronize(one.device)
        started = time.perf_counter()
        one @ one
        synchronize(one.device)
        best = min(best, time.perf_counter() - started)
    return size ** 3 / best
