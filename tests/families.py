"""Tiny random pipelines of the families that the command is tested on: FAMILIES, name -> a function that makes one."""
from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    SanaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from test_surgery import BUILD, FLUX, SD3
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from pruning import data
from pruning.models import pipelines
from pruning.models.provenance import release

SIZE = 32  # pixels a side: a latent of 8 x 8, as a VAE of three levels shrinks images to a quarter
LEVELS = (8, 8, 8)  # channels of the levels of a VAE
TEXT = 24  # width of a caption's tokens in the denoisers of tests/test_surgery.py
POOLED = 16  # width of their pooled captions


def clip(width, projected=None, number=""):
    """Return a CLIP text encoder and the bundled tokenizer as components of a pipeline; `number` ends their names."""
    tokenizer = CLIPTokenizer.from_pretrained(pipelines.MODELS["shapes-unet"].folder / "tokenizer")
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projected or width, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=128)  # to which HiDream fills captions up
    return {f"text_encoder{number}": kind(config), f"tokenizer{number}": tokenizer}


def word_tokenizer():
    """Return a tokenizer whose tokens are the words of the captions of drawn scenes."""
    found = {f"▁{word}" for sample in data.load_samples("shapes", 64)[0] for word in sample.caption.split()}
    tokenizer = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0),
                                   *((word, -2.0) for word in sorted(found))], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def t5(number=""):
    tokenizer = T5TokenizerFast(tokenizer_object=word_tokenizer(), extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {f"text_encoder{number}": T5EncoderModel(config), f"tokenizer{number}": tokenizer}


def gemma():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return dict(text_encoder=Gemma2Model(config), tokenizer=tokenizer)


def vae(channels, levels=3, **options):
    return AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=4,
        layers_per_block=1, up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=channels, sample_size=SIZE,
        **options)


def sana_vae():
    levels = dict(block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), block_out_channels=LEVELS,
                  layers_per_block=(1, 1, 1), qkv_multiscales=((), (), (5,)))
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, downsample_block_type="conv", upsample_block_type="interpolate",
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in levels.items()})


def sd3(**options):
    return dict(
        transformer=SD3Transformer2DModel(**dict(SD3, in_channels=16, out_channels=16), **options),
        vae=vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **clip(TEXT // 2, POOLED // 2), **clip(TEXT // 2, POOLED // 2, "_2"))


def flux(guidance_embeds):
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**dict(FLUX, in_channels=4 * 16), guidance_embeds=guidance_embeds),
        vae=vae(16, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        **clip(POOLED), **t5("_2"))


def qwen_tokenizer(post_processor=None):
    """Return the tokenizer of drawn scenes with a chat template."""
    words = word_tokenizer()
    if post_processor:
        words.post_processor = post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}")


def qwen_config(kind, tokenizer, **options):
    return kind(vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, **options)


def z_image(blocks=1):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=blocks, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT,
            axes_dims=[4, 4, 8], axes_lens=[1024, 32, 32]),
        vae=vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(qwen_config(Qwen3Config, tokenizer, head_dim=8)), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def qwen_vl(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = dict(vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1,
                rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]})
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=TEXT), **text))


def qwen_image(blocks=1):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=blocks, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=TEXT, axes_dims_rope=(8, 4, 4)),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=qwen_vl(tokenizer), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1),
        vae=vae(16, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(), **t5())


def lumina2():
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4, in_channels=16, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=4,
            num_kv_heads=2, axes_dim_rope=(4, 2, 2), axes_lens=(1024, 32, 32), cap_feat_dim=TEXT, multiple_of=16),
        vae=vae(16, levels=4, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(), **gemma())


def auraflow():
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel
    tokenizer = T5TokenizerFast(tokenizer_object=word_tokenizer(), extra_ids=0)
    return AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=TEXT, caption_projection_dim=32,
            pos_embed_max_size=64),
        text_encoder=UMT5EncoderModel(UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
        tokenizer=tokenizer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler())


def cogview4(blocks=1):
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel
    tokenizer = qwen_tokenizer(processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)]))
    return CogView4Pipeline(
        transformer=CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=blocks, attention_head_dim=8, num_attention_heads=4,
            text_embed_dim=TEXT, time_embed_dim=16, condition_dim=8, sample_size=8),
        text_encoder=GlmModel(qwen_config(GlmConfig, tokenizer, head_dim=8, pad_token_id=0)), tokenizer=tokenizer,
        vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def sana_sprint():
    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    return SanaSprintPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT,
            sample_size=8, guidance_embeds=True),
        vae=sana_vae(), scheduler=SCMScheduler(), **gemma())


def flux2_klein():
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16),
        vae=AutoencoderKLFlux2(
            block_out_channels=LEVELS, down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
            layers_per_block=1, up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, sample_size=SIZE),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(  # the pipeline reads the states of layers 9, 18 and 27
            vocab_size=len(tokenizer), hidden_size=TEXT // 3, intermediate_size=32, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4)),
        tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def hunyuan_dit():
    from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel
    tokenizer = qwen_tokenizer()
    return HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            sample_size=8, in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=4, attention_head_dim=8,
            num_layers=2, mlp_ratio=2.0, cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT,
            pooled_projection_dim=POOLED),
        text_encoder=BertModel(BertConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2)),
        tokenizer=tokenizer, vae=vae(4, levels=4), scheduler=DDPMScheduler(prediction_type="v_prediction"), **t5("_2"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def omnigen():
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel
    tokenizer = qwen_tokenizer()
    return OmniGenPipeline(
        transformer=OmniGenTransformer2DModel(
            in_channels=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
            num_layers=1, pad_token_id=0, vocab_size=len(tokenizer), time_step_dim=8, pos_embed_max_size=8,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}),
        vae=vae(4, levels=4), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1))


def hidream():
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = qwen_tokenizer()
    return HiDreamImagePipeline(
        transformer=HiDreamImageTransformer2DModel(
            patch_size=8, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=4, caption_channels=(TEXT, TEXT), text_emb_dim=POOLED, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(4, 6, 6), llama_layers=(0, 1)),
        vae=vae(16, levels=1, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **clip(POOLED // 2, POOLED // 2),
        **clip(POOLED // 2, POOLED // 2, "_2"), **t5("_3"), tokenizer_4=tokenizer,
        text_encoder_4=LlamaForCausalLM(qwen_config(LlamaConfig, tokenizer, head_dim=8)))


def kandinsky5(blocks=1):
    from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=TEXT, in_text_dim2=POOLED, time_dim=16, model_dim=32,
        ff_dim=48, num_text_blocks=1, num_visual_blocks=blocks, axes_dims=(4, 6, 6))
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # gates, which would hide the blocks behind them
    return Kandinsky5T2IPipeline(
        transformer=transformer, vae=vae(16, levels=1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()),
        **clip(POOLED, number="_2"))


FAMILIES = {
    "sd15": lambda: StableDiffusionPipeline(
        unet=BUILD["sd15"](), vae=vae(4), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **clip(TEXT),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False),
    "sdxl": lambda: StableDiffusionXLPipeline(
        unet=BUILD["sdxl"](), vae=vae(4), scheduler=EulerDiscreteScheduler(), **clip(TEXT // 2),
        **clip(TEXT // 2, POOLED, "_2")),
    "pixart": lambda: PixArtSigmaPipeline(
        transformer=BUILD["pixart"](), vae=vae(4), scheduler=DPMSolverMultistepScheduler(), **t5()),
    "sd3": lambda: StableDiffusion3Pipeline(**sd3(), text_encoder_3=None, tokenizer_3=None),
    "sd35": lambda: StableDiffusion3Pipeline(**sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), **t5("_3")),
    "flux_dev": lambda: flux(guidance_embeds=True),
    "flux_schnell": lambda: flux(guidance_embeds=False),
    "sana": lambda: SanaPipeline(
        transformer=BUILD["sana"](), vae=sana_vae(), **gemma(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)),
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "sana_sprint": sana_sprint,
    "flux2_klein": flux2_klein,
    "hunyuan_dit": hunyuan_dit,
    "omnigen": omnigen,
    "hidream": hidream,
    "kandinsky5": kandinsky5,
}
# Pixels a side. Two families draw one size alone, of 128 x 128 latents: here by a VAE that does not shrink images.
SIZES = {**dict.fromkeys(FAMILIES, SIZE), "hidream": 128, "kandinsky5": 128}
# Of classes that the oldest releases lack, or run with torch 2.5 alone.
NEEDS_TORCH_25 = ("flux", "sana", "z_image", "qwen", "chroma", "lumina2", "auraflow", "cogview4", "omnigen", "hidream",
                  "kandinsky5")  # on the CPU
OLD_TORCH = release("torch") < (2, 5)
