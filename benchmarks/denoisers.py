"""The denoisers that benchmarks prune: published shapes with random weights, and the bundled models."""
from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import diffusers
import torch

from pruning.data import Sample
from pruning.methods import surgery
from pruning.models import generation, pipelines


class Model(NamedTuple):
    """A model to measure. A bundled model needs the rounds alone; the other fields describe one of random weights."""

    rounds: int  # how often the dense and the pruned denoiser are timed, in alternation
    denoiser: Optional[str] = None  # class in diffusers
    config: Dict[str, Any] = {}
    latents: Dict[str, int] = {}  # device -> side of the latent: as published on CUDA, smaller on the CPU
    inputs: Optional[Callable[[int], Dict[str, tuple]]] = None  # side of the latent -> shapes of a call's arguments
    layers: Dict[str, int] = {}  # device -> number of blocks to build, if a CPU has no memory for all


MODELS = {
    "sd15": Model(  # Stable Diffusion 1.5; its other values are the defaults of the class
        9, "UNet2DConditionModel",
        {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
         "attention_head_dim": 8, "cross_attention_dim": 768},
        {"cpu": 32, "cuda": 64},
        lambda side: {"sample": (1, 4, side, side), "timestep": (1,), "encoder_hidden_states": (1, 77, 768)}),
    "sd3": Model(  # Stable Diffusion 3 medium, with the 333 caption tokens that its pipeline passes
        3, "SD3Transformer2DModel",
        {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
         "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
         "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192},
        {"cpu": 48, "cuda": 128},
        lambda side: {"hidden_states": (1, 16, side, side), "timestep": (1,), "pooled_projections": (1, 2048),
                      "encoder_hidden_states": (1, 333, 4096)},
        {"cpu": 6, "cuda": 24}),
    "sdxl": Model(  # Stable Diffusion XL
        3, "UNet2DConditionModel",
        {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
         "cross_attention_dim": 2048, "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        {"cpu": 32, "cuda": 128},
        lambda side: {"sample": (1, 4, side, side), "timestep": (1,), "encoder_hidden_states": (1, 77, 2048),
                      "added_cond_kwargs": {"text_embeds": (1, 1280), "time_ids": (1, 6)}}),
    "sd35": Model(  # Stable Diffusion 3.5 large
        3, "SD3Transformer2DModel",
        {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 38,
         "num_attention_heads": 38, "attention_head_dim": 64, "joint_attention_dim": 4096, "qk_norm": "rms_norm",
         "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192},
        {"cpu": 48, "cuda": 128},
        lambda side: {"hidden_states": (1, 16, side, side), "timestep": (1,), "pooled_projections": (1, 2048),
                      "encoder_hidden_states": (1, 333, 4096)},
        {"cpu": 4, "cuda": 38}),
    "flux": Model(  # Flux, with twice as many single blocks as double ones; a latent's side is in its 2 x 2 patches
        3, "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
         "guidance_embeds": True},
        {"cpu": 32, "cuda": 64},
        lambda side: {"hidden_states": (1, side * side, 64), "timestep": (1,), "guidance": (1,),
                      "pooled_projections": (1, 768), "encoder_hidden_states": (1, 512, 4096), "txt_ids": (512, 3),
                      "img_ids": (side * side, 3)},
        {"cpu": 2, "cuda": 19}),
    **{name: Model(20) for name in pipelines.MODELS},
}


def build(name: str, settings: dict, device: str) -> Tuple[Any, dict]:
    """Return a denoiser of MODELS in eval mode, and the keyword arguments of the call to time.

    settings: its `latent`, `layers` and `dtype`.
    """
    if MODELS[name].denoiser:
        return random_denoiser(MODELS[name], settings, device)
    return bundled_denoiser(name, settings, device)


def random_denoiser(model: Model, settings: dict, device: str) -> Tuple[Any, dict]:
    """Return a denoiser of random weights, and the keyword arguments of the call to time.

    The denoiser is built on the meta device and filled once: weights are uniform with a standard deviation of
    1 / sqrt(fan in), norms 1, biases 0. Then every removable unit is scaled by a factor of its own in [1/2, 2], as
    otherwise all units of a layer would have nearly the same score.
    """
    config = {**model.config, "num_layers": settings["layers"]} if model.layers else dict(model.config)
    if "num_single_layers" in config:
        config["num_single_layers"] = 2 * config["num_layers"]
    torch.manual_seed(0)
    diffusers.logging.set_verbosity_error()  # .to(dtype) would warn
    with torch.device("meta"):
        denoiser = getattr(diffusers, model.denoiser)(**config).to(getattr(torch, settings["dtype"]))
    denoiser = denoiser.to_empty(device=device).eval()
    with torch.no_grad():
        for key, tensor in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound) if tensor.dim() > 1 else tensor.fill_(float(key.endswith("weight")))
        for group in surgery.survey(denoiser, *surgery.UNITS)[0]:
            scale = torch.exp2(2 * torch.rand(group.units) - 1)
            for part in group.parts(scored=True):
                own = group.by_unit(part.layer.weight, part)
                own.mul_(scale.to(own).view([-1 if d == part.dim + 1 else 1 for d in range(own.dim())]))
    return denoiser, random_inputs(model.inputs(settings["latent"]), denoiser)


def random_inputs(shapes: dict, denoiser) -> dict:
    """Return random tensors of these shapes, nested ones too, on the device and in the dtype of the denoiser."""
    return {key: random_inputs(shape, denoiser) if isinstance(shape, dict)
            else torch.randn(shape).to(denoiser.device, denoiser.dtype) for key, shape in shapes.items()}


def bundled_denoiser(name: str, settings: dict, device: str) -> Tuple[Any, dict]:
    """Return a bundled model's denoiser, and the keyword arguments of its pipeline's call for one latent.

    The call has no guidance, which would double the batch.
    """
    pipeline = pipelines.load_pipeline(name, device, settings["dtype"])
    size = pipelines.sampling_settings(pipeline, name)["image_size"]
    call = generation.first_call(
        pipeline, [Sample("benchmark", "a large red circle", None)], seed=0, steps=1, guidance_scale=1.0, batch_size=1,
        image_size=settings["latent"] * pipeline.vae_scale_factor if settings["latent"] else size)
    return getattr(pipeline, pipelines.denoiser_name(pipeline)).eval(), call
