"""Tiny random models of the denoiser classes that diffusers has, and a call of each.

DENOISERS: name -> (config, call). A name is a class of diffusers, with a suffix after "/" if a class stands for several
models. A call is a function of randn(*shape) that returns keyword arguments. A class that the installed diffusers does
not have is left out of NAMES.
"""
from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn

HEADS = dict(num_attention_heads=4, attention_head_dim=8)
LONG = torch.long


def ids(rows, columns, frame=0):
    """Positions of tokens in a picture, (tokens, 3)."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full((rows * columns,), frame), *(each.flatten() for each in grid)], 1).float()


def tokens(randn, channels=4, text=24, **more):
    """A call of a denoiser that reads 4 x 4 latent tokens."""
    return dict(hidden_states=randn(1, 16, channels), encoder_hidden_states=randn(1, 5, text),
                timestep=torch.tensor([0.4]), **more)


def image(randn, channels=4, text=24, size=8, **more):
    """A call of a denoiser that reads a picture of latents."""
    return {"hidden_states": randn(1, channels, size, size), "encoder_hidden_states": randn(1, 5, text),
            "timestep": torch.tensor([400]), **more}


def video(randn, channels=4, text=24, size=8, frames=2, **more):
    """A call of a denoiser that reads a film of latents."""
    return {"hidden_states": randn(1, channels, frames, size, size), "encoder_hidden_states": randn(1, 5, text),
            "timestep": torch.tensor([400]), **more}


def flux_ids(**more):
    return dict(img_ids=ids(4, 4), txt_ids=torch.zeros(5, 3), **more)


ONES = torch.ones(1, 5)
FLUX = dict(num_layers=1, num_single_layers=1, in_channels=4, num_attention_heads=4, attention_head_dim=16,
            joint_attention_dim=24, axes_dims_rope=(4, 4, 8))
WAN = dict(patch_size=(1, 2, 2), **HEADS, in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48,
           num_layers=1)
UNET = dict(sample_size=8, layers_per_block=1, norm_num_groups=8, block_out_channels=(32, 64))
HUNYUAN = dict(in_channels=4, out_channels=4, **HEADS, num_layers=1, num_single_layers=1, num_refiner_layers=1,
               text_embed_dim=24, rope_axes_dim=(2, 2, 4))

DENOISERS = {
    "AllegroTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=32, sample_height=8,
             sample_width=8, sample_frames=2, caption_channels=24),
        lambda r: dict(hidden_states=r(1, 4, 2, 8, 8), encoder_hidden_states=r(1, 1, 5, 24),
                       timestep=torch.tensor([400]), attention_mask=torch.ones(1, 2, 8, 8),
                       encoder_attention_mask=torch.ones(1, 1, 5),
                       image_rotary_emb=None)),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, **HEADS, joint_attention_dim=24,
             caption_projection_dim=32, pos_embed_max_size=16),
        lambda r: image(r)),
    "BriaTransformer2DModel": (dict(FLUX, pooled_projection_dim=None), lambda r: tokens(r, **flux_ids())),
    "BriaFiboTransformer2DModel": (
        dict(FLUX, joint_attention_dim=64, text_encoder_dim=24),
        lambda r: tokens(r, text=64, text_encoder_layers=[r(1, 5, 24) for _ in range(2)], **flux_ids())),
    "BriaFibo2Transformer2DModel": (
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=24,
             injection_layer_ids=(1,),
             perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4,
             gist_max_text_len=16, axes_dims=(4, 4, 8), axes_lens=(64, 32, 32)),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timestep=torch.tensor([0.4]), encoder_hidden_states=r(1, 2, 5,
                                                                                                          24))),
    "ChromaTransformer2DModel": (
        dict(FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        lambda r: tokens(r, **flux_ids())),
    "ChronoEditTransformer3DModel": (WAN, lambda r: video(r)),
    "CogVideoXTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=24, num_layers=1, sample_width=8,
             sample_height=8, sample_frames=5, max_text_seq_length=5),
        lambda r: dict(hidden_states=r(1, 2, 4, 8, 8), encoder_hidden_states=r(1, 5, 24), timestep=torch.tensor([4]))),
    "CogView3PlusTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, **HEADS, text_embed_dim=24, time_embed_dim=16,
             condition_dim=8,
             pos_embed_max_size=8, sample_size=8),
        lambda r: image(r, original_size=torch.tensor([[64, 64]]), target_size=torch.tensor([[64, 64]]),
                        crop_coords=torch.tensor([[0, 0]]))),
    "CogView4Transformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, **HEADS, text_embed_dim=24, time_embed_dim=16,
             condition_dim=8,
             pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8)),
        lambda r: image(r, original_size=torch.tensor([[64, 64]]), target_size=torch.tensor([[64, 64]]),
                        crop_coords=torch.tensor([[0, 0]]))),
    "ConsisIDTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=24, num_layers=1, sample_width=8,
             sample_height=8, sample_frames=5, max_text_seq_length=5),
        lambda r: dict(hidden_states=r(1, 2, 4, 8, 8), encoder_hidden_states=r(1, 5, 24), timestep=torch.tensor([4]))),
    "CosmosTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
             text_embed_dim=24,
             adaln_lora_dim=4, max_size=(4, 16, 16)),
        lambda r: video(r, padding_mask=torch.zeros(1, 1, 8, 8), fps=24)),
    "DiTTransformer2DModel": (
        dict(**HEADS, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=8),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timestep=torch.tensor([4]), class_labels=torch.tensor([3]))),
    "DreamLiteUNetModel": (
        dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
             attention_head_dim=8,
             down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
             up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D")),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(1, 5, 24))),
    "EasyAnimateTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
             sample_width=8, sample_height=8,
             num_layers=1, mmdit_layers=1, time_embed_dim=16, text_embed_dim=24),
        lambda r: video(r)),
    "ErnieImageTransformer2DModel": (
        dict(hidden_size=32, num_attention_heads=4, num_layers=1, ffn_hidden_size=48, in_channels=4, out_channels=4,
             text_in_dim=24, rope_axes_dim=(2, 2, 4)),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timestep=torch.tensor([4]), text_bth=r(1, 5, 24),
                       text_lens=torch.tensor([5]))),
    "Flux2Transformer2DModel": (
        dict(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
             joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda r: tokens(r, img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(5, 4), guidance=torch.tensor([3.5]))),
    "Flux3Transformer2DModel": (
        dict(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
             num_attention_heads=4, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda r: tokens(r, img_ids=torch.zeros(16, 4), txt_ids=torch.zeros(5, 4))),
    "FluxTransformer2DModel": (
        dict(FLUX, pooled_projection_dim=16, guidance_embeds=True),
        lambda r: tokens(r, pooled_projections=r(1, 16), guidance=torch.tensor([3.5]), **flux_ids())),
    "GlmImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, **HEADS, text_embed_dim=24, time_embed_dim=16,
             condition_dim=8,
             prior_vq_quantizer_codebook_size=8),
        lambda r: image(r, prior_token_id=torch.zeros(1, 16, dtype=LONG), prior_token_drop=torch.zeros(1, 16,

                                                                                                      dtype=torch.bool),
                        target_size=torch.tensor([[64, 64]]), crop_coords=torch.tensor([[0, 0]]))),
    "HeliosTransformer3DModel": (
        dict(WAN, rope_dim=(4, 2, 2), has_multi_term_memory_patch=False, guidance_cross_attn=False,
             zero_history_timestep=False),
        lambda r: video(r, indices_hidden_states=torch.arange(2)[None])),
    "HiDreamImageTransformer2DModel": (
        dict(patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
             num_attention_heads=4,
             caption_channels=(24, 24), text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
             axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=(0, 1)),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timesteps=torch.tensor([4]), encoder_hidden_states_t5=r(1, 5, 24),
                       encoder_hidden_states_llama3=r(2, 1, 5, 24), pooled_embeds=r(1, 16))),
    "HunyuanDiT2DModel": (
        dict(**HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=2, mlp_ratio=4.0,
             cross_attention_dim=24, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=5, text_len_t5=5),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timestep=torch.tensor([4.0]), encoder_hidden_states=r(1, 5, 24),
                       text_embedding_mask=ONES, encoder_hidden_states_t5=r(1, 5, 24), text_embedding_mask_t5=ONES,
                       image_meta_size=r(1, 6), style=torch.zeros(1, dtype=LONG),
                       image_rotary_emb=[torch.ones(16, 8), torch.zeros(16, 8)])),
    "HunyuanImageTransformer2DModel": (
        dict(HUNYUAN, rope_axes_dim=(4, 4)), lambda r: image(r, encoder_attention_mask=ONES,
                                                             timestep=torch.tensor([400.0]))),
    "HunyuanVideo15Transformer3DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, num_layers=1, num_refiner_layers=1, text_embed_dim=24,
             text_embed_2_dim=24, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=8),
        lambda r: video(r, timestep=torch.tensor([400.0]), encoder_attention_mask=ONES, encoder_hidden_states_2=r(1,
                                                                                                                  5,
                                                                                                                  24),
                        encoder_attention_mask_2=ONES, image_embeds=r(1, 3, 12))),
    "HunyuanVideoFramepackTransformer3DModel": (
        dict(HUNYUAN, pooled_projection_dim=16, has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True),
        lambda r: video(r, encoder_attention_mask=ONES, pooled_projections=r(1, 16), image_embeds=r(1, 3, 12),
                        indices_latents=torch.arange(2), guidance=torch.tensor([3.5]),
                        latents_clean=r(1, 4, 1, 8, 8), indices_latents_clean=torch.arange(1),
                        latents_history_2x=r(1, 4, 2, 8, 8), indices_latents_history_2x=torch.arange(2),
                        latents_history_4x=r(1, 4, 4, 8, 8), indices_latents_history_4x=torch.arange(4))),
    "HunyuanVideoTransformer3DModel": (
        dict(HUNYUAN, pooled_projection_dim=16),
        lambda r: video(r, encoder_attention_mask=ONES, pooled_projections=r(1, 16), guidance=torch.tensor([3.5]))),
    "HunyuanVideoTransformer3DModel/replace": (
        dict(HUNYUAN, pooled_projection_dim=16, image_condition_type="token_replace"),
        lambda r: video(r, encoder_attention_mask=ONES, pooled_projections=r(1, 16), guidance=torch.tensor([3.5]))),
    "Ideogram4Transformer2DModel": (
        dict(in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4, intermediate_size=48,
             adaln_dim=8,
             llm_features_dim=24, mrope_section=(4, 2, 2)),
        lambda r: dict(hidden_states=r(1, 12, 4), timestep=torch.tensor([0.4]), encoder_hidden_states=r(1, 12, 24),
                       position_ids=torch.arange(12)[None, :, None].expand(1, 12, 3), segment_ids=torch.zeros(1, 12,


                                                                                                            dtype=LONG),
                       indicator=torch.tensor([[3] * 4 + [2] * 8]))),
    "JoyImageEditTransformer3DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=1, rope_dim_list=[4, 6, 6]),
        lambda r: video(r)),
    "Kandinsky5Transformer3DModel": (
        dict(in_visual_dim=4, in_text_dim=24, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=48,
             num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6)),
        lambda r: dict(hidden_states=r(1, 2, 8, 8, 4), encoder_hidden_states=r(1, 5, 24), timestep=torch.tensor([4.0]),
                       pooled_projections=r(1, 16), visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)],
                       text_rope_pos=torch.arange(5))),
    "Kandinsky3UNet": (
        dict(time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(32, 64),
             cross_attention_dim=32, encoder_hid_dim=24),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(1, 5, 24),
                       encoder_attention_mask=torch.ones(1, 5))),
    "Krea2Transformer2DModel": (
        dict(in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=2,
             text_num_attention_heads=2,
             text_num_key_value_heads=2, text_intermediate_size=48, num_layerwise_text_blocks=1,
             num_refiner_text_blocks=1,
             axes_dims_rope=(4, 4, 8)),
        lambda r: dict(hidden_states=r(1, 16, 4), encoder_hidden_states=r(1, 5, 2, 32), timestep=torch.tensor([0.4]),
                       position_ids=torch.zeros(21, 3))),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, cross_attention_dim=32, num_layers=1, caption_channels=24),
        lambda r: tokens(r, encoder_attention_mask=ONES, num_frames=1, height=4, width=4)),
    "LatteTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=32, sample_size=8, patch_size=2,
             activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False,
             attention_bias=True, caption_channels=24, video_length=2, num_embeds_ada_norm=1000),
        lambda r: video(r)),
    "LongCatImageTransformer2DModel": (dict(FLUX, pooled_projection_dim=24), lambda r: tokens(r, **flux_ids())),
    "Lumina2Transformer2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=4,
             num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(16, 8, 8), cap_feat_dim=24),
        lambda r: image(r, encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool))),
    "LuminaNextDiT2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=4, num_kv_heads=2,
             multiple_of=16, cross_attention_dim=24),
        lambda r: image(r, encoder_mask=torch.ones(1, 5), image_rotary_emb=torch.ones(8, 8, 4, dtype=torch.complex64),
                        cross_attention_kwargs={})),
    "MochiTransformer3DModel": (
        dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
             text_embed_dim=24, time_embed_dim=4, max_sequence_length=5),
        lambda r: video(r, encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool))),
    "MotifVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, num_layers=1, num_single_layers=1, text_embed_dim=24,
             rope_axes_dim=(2, 2, 4), enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        lambda r: video(r, encoder_attention_mask=ONES)),
    "NucleusMoEImageTransformer2DModel": (
        dict(in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=4,
             num_key_value_heads=2, joint_attention_dim=24, axes_dims_rope=(8, 4, 4), num_experts=2,
             moe_intermediate_dim=24, capacity_factors=[1.0] * 4, dense_moe_strategy="all_moe"),
        lambda r: tokens(r, channels=16, img_shapes=[(1, 4, 4)], encoder_hidden_states_mask=torch.ones(1, 5,
                                                                                                       dtype=LONG))),
    "OmniGenTransformer2DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
             num_layers=1, pad_token_id=0, vocab_size=16, time_step_dim=8, rope_scaling={
                 "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}),
        lambda r: dict(hidden_states=r(1, 4, 8, 8), timestep=torch.tensor([0.4]), input_ids=torch.arange(5)[None],
                       input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(1, 22, 22),
                       position_ids=torch.arange(22)[None])),
    "OvisImageTransformer2DModel": (dict(FLUX, out_channels=4), lambda r: tokens(r, **flux_ids())),
    "PRXTransformer2DModel": (
        dict(in_channels=4, context_in_dim=24, hidden_size=32, num_heads=4, depth=1, axes_dim=[4, 4]),
        lambda r: image(r)),
    "PixArtTransformer2DModel": (
        dict(**HEADS, num_layers=1, cross_attention_dim=32, caption_channels=24, sample_size=8, out_channels=8),
        lambda r: image(r, added_cond_kwargs={"resolution": None, "aspect_ratio": None})),
    "PriorTransformer": (
        dict(**HEADS, num_layers=1, embedding_dim=12, num_embeddings=5, additional_embeddings=4),
        lambda r: dict(hidden_states=r(1, 12), timestep=torch.tensor([4]), proj_embedding=r(1, 12),
                       encoder_hidden_states=r(1, 5, 12))),
    "QwenImageTransformer2DModel": (
        dict(in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4,
             joint_attention_dim=24, axes_dims_rope=(8, 4, 4)),
        lambda r: tokens(r, channels=16, img_shapes=[(1, 4, 4)], encoder_hidden_states_mask=torch.ones(1, 5),
                         txt_seq_lens=[5])),
    "QwenImage21Transformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4,
             context_in_dim=24,
             axes_dims_rope=(8, 4, 4)),
        lambda r: tokens(r, img_shapes=[[(1, 4, 4)]], img_mask=torch.arange(9)[None] >= 5,
                         encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool))),
    "SD3Transformer2DModel": (
        dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
             joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=4,
             dual_attention_layers=(0,), qk_norm="rms_norm"),
        lambda r: image(r, pooled_projections=r(1, 16))),
    "SanaTransformer2DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, num_layers=1, num_cross_attention_heads=2,
             cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24, sample_size=8),
        lambda r: image(r)),
    "SanaVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
             num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
             sample_size=8),
        lambda r: video(r)),
    "SkyReelsV2Transformer3DModel": (WAN, lambda r: video(r)),
    "StableCascadeUNet": (
        dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=32,
             block_out_channels=(32, 32),
             num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
             clip_text_in_channels=24, clip_text_pooled_in_channels=16, clip_image_in_channels=16, clip_seq=2),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep_ratio=torch.tensor([0.4]), clip_text_pooled=r(1, 1, 16),
                       clip_text=r(1, 5, 24), clip_img=r(1, 1, 16))),
    "UNet2DConditionModel": (
        dict(UNET, cross_attention_dim=24, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",
                                                                                   "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(1, 5, 24))),
    "UNet2DConditionModel/kandinsky": (
        dict(UNET, cross_attention_dim=24, attention_head_dim=8, encoder_hid_dim=24, encoder_hid_dim_type="image_proj",
             addition_embed_type="image", resnet_time_scale_shift="scale_shift",
             down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
             up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
             mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=None,
                       added_cond_kwargs={"image_embeds": r(1, 24)})),
    "UNet2DConditionModel/deepfloyd": (
        dict(UNET, cross_attention_dim=32, attention_head_dim=8, encoder_hid_dim=16, addition_embed_type="text",
             addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
             down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), act_fn="gelu",
             up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
             mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(1, 5, 16))),
    "UNet2DModel": (
        dict(UNET, in_channels=4, out_channels=4, attention_head_dim=8, down_block_types=("DownBlock2D",
                                                                                          "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda r: dict(sample=r(1, 4, 8, 8), timestep=torch.tensor([4]))),
    "UNet3DConditionModel": (
        dict(UNET, cross_attention_dim=24, attention_head_dim=8, down_block_types=("CrossAttnDownBlock3D",
                                                                                   "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        lambda r: dict(sample=r(1, 4, 2, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(1, 5, 24))),
    "UNetMotionModel": (
        dict(UNET, cross_attention_dim=24, num_attention_heads=4, motion_num_attention_heads=4,
             down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
             up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion")),
        lambda r: dict(sample=r(1, 4, 2, 8, 8), timestep=torch.tensor([4]), encoder_hidden_states=r(2, 5, 24))),
    "UNetSpatioTemporalConditionModel": (
        dict(sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=24,
             num_attention_heads=(4, 8),
             num_frames=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        lambda r: dict(sample=r(1, 2, 8, 8, 8), timestep=torch.tensor([4.0]), encoder_hidden_states=r(1, 1, 24),
                       added_time_ids=r(1, 3))),
    "UVit2DModel": (
        dict(hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
             encoder_hidden_size=24,
             vocab_size=16, codebook_size=12, in_channels=32, block_out_channels=32, num_res_blocks=1,
             block_num_heads=4,
             num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, sample_size=8),
        lambda r: dict(input_ids=torch.arange(64).view(1, 8, 8) % 12, encoder_hidden_states=r(1, 5, 24),
                       pooled_text_emb=r(1, 16), micro_conds=r(1, 5))),
    "WanTransformer3DModel": (WAN, lambda r: video(r)),
    "WanTransformer3DModel/image": (
        dict(WAN, image_dim=12, added_kv_proj_dim=32), lambda r: video(r, encoder_hidden_states_image=r(1, 257, 12))),
    "WanVACETransformer3DModel": (
        dict(WAN, num_layers=2, vace_layers=[0], vace_in_channels=4),
        lambda r: video(r, control_hidden_states=r(1, 4, 2, 8, 8))),
    "WuerstchenPrior": (
        dict(c_in=4, c=32, c_cond=24, c_r=8, depth=1, nhead=4),
        lambda r: dict(x=r(1, 4, 8, 8), r=torch.tensor([0.4]), c=r(1, 5, 24))),
    "ZImageTransformer2DModel": (
        dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
             axes_dims=[4, 4, 8], axes_lens=[64, 32, 32]),
        lambda r: dict(x=[r(4, 1, 8, 8)], t=torch.tensor([0.4]), cap_feats=[r(5, 24)])),
}
# Classes that diffusers itself does not export, and the modules that may have them.
ELSEWHERE = {
    "StableCascadeUNet": ("diffusers.models.unets.unet_stable_cascade",),
    "WuerstchenPrior": ("diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior",
                        "diffusers.pipelines.wuerstchen.modeling_wuerstchen_prior")}


def denoiser_class(name):
    """Return the class of a name of DENOISERS, None if the installed diffusers does not have it."""
    own = name.split("/")[0]
    for module in ELSEWHERE.get(own, ("diffusers",)):
        try:
            return getattr(importlib.import_module(module), own)
        except (ImportError, AttributeError):
            continue
    return None


NAMES = [name for name in DENOISERS if denoiser_class(name)]


def build(name):
    """A random model without zeros and ones, in which a fresh one would hide what a unit does."""
    torch.manual_seed(0)
    model = denoiser_class(name)(**DENOISERS[name][0]).eval()
    for own, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in own and own.endswith("weight")), std=0.3)
        elif not own.endswith("weight") or not parameter.any():  # tables and experts, which may be uninitialised
            nn.init.normal_(parameter, std=0.1)
    return model


def call_of(name, seed=1):
    """The keyword arguments of the call that the class takes, the same each time."""
    generator, taken = torch.Generator().manual_seed(seed), inspect.signature(denoiser_class(name).forward).parameters
    call = DENOISERS[name][1](lambda *shape: torch.randn(shape, generator=generator))
    return {argument: value for argument, value in call.items() if argument in taken}


def run(name, model, seed=1):
    """The model's output on its call. Skips the test if torch is too old for the class."""
    try:
        with torch.no_grad():
            output = model(**call_of(name, seed))
    except TypeError as error:
        if "enable_gqa" in str(error):
            pytest.skip(f"{name} needs torch 2.5")
        raise
    return tensor_of(output)


def tensor_of(output):
    """The tensor in what a denoiser returns."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
    return output
