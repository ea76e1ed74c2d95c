"""Train the bundled models and their metric networks on drawn scenes alone.

    python pruning/shapes/train.py --work_dir /tmp/shapes

The stages are vae, features, clip, unet, mmdit and export. Each training stage
saves a checkpoint in the work folder and continues from it; a finished stage is
not repeated. All stages take about 140 minutes on two CPU cores, and far less
with CUDA.
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pruning.shapes import scenes

HERE = Path(__file__).resolve().parent
TOKENS = 20  # the longest caption has 16 tokens, including its start and end tokens
MMDIT_TOKENS = 16  # tokens that the transformer takes from each CLIP text encoder
T5_TOKENS = 256  # zero tokens that StableDiffusion3Pipeline appends if it has no T5
# stage -> steps, batch size, peak learning rate, decay of the averaged weights, running loss that ends the stage early
RECIPE = {
    "vae": (2600, 32, 3e-3, 0.995, 0.0),
    "features": (3000, 128, 1e-3, 0.99, 0.0),
    "clip": (2400, 192, 1e-3, 0.995, 0.05),
    "unet": (4600, 64, 1e-3, 0.998, 0.0),
    "mmdit": (6000, 64, 1.5e-3, 0.998, 0.0),
}


# ---------------------------------------------------------------- data

def load_split(work_dir: Path, split: str):
    """Return all images of a split, uint8 (n, 64, 64, 3), and its scenes. The images are rendered once and kept."""
    count, _ = scenes.SPLITS[split]
    drawn = [scenes.scene(split, i) for i in range(count)]
    path = work_dir / f"{split}.npy"
    if not path.exists():
        images = np.stack([np.asarray(scenes.render(s)) for s in tqdm(drawn, desc=f"render {split}")])
        np.save(path.with_suffix(".part.npy"), images)
        os.replace(path.with_suffix(".part.npy"), path)
    return np.load(path), drawn


def pixels(images: np.ndarray, device) -> torch.Tensor:
    """Convert images from uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def attributes(drawn) -> torch.Tensor:
    """Return what the scenes show as class indices, int (n, 8).

    The columns are background and relation, then colour, shape and size word of the first object, then those of the
    second object. If there is no second object, its columns hold the last class, which means "absent".
    """
    backgrounds, colours = list(scenes.BACKGROUNDS), list(scenes.COLOURS)
    relations, sizes = ["", "above", "to the left of"], list(scenes.RADII)
    rows = []
    for s in drawn:
        row = [backgrounds.index(s.background), relations.index(s.relation)]
        for o in s.objects:
            row += [colours.index(o.colour), scenes.SHAPES.index(o.shape), sizes.index(o.size)]
        row += [len(colours), len(scenes.SHAPES), len(sizes)] * (2 - len(s.objects))
        rows.append(row)
    return torch.tensor(rows)


ATTRIBUTE_CLASSES = (4, 3, 9, 7, 4, 9, 7, 4)  # the number of classes in each column of `attributes`


def positions(drawn) -> torch.Tensor:
    """Return x, y and radius of both objects, each scaled to [-1, 1], float (n, 6). An absent object has zeros."""
    rows = [[v for o in s.objects for v in (o.x / 32 - 1, o.y / 32 - 1, o.radius / 16 - 1)] for s in drawn]
    return torch.tensor([row + [0.0] * (6 - len(row)) for row in rows])


class AttributeHeads(nn.Module):
    """Linear heads, used in training only, that make the features predict the attributes and positions of a scene."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.ModuleList(nn.Linear(width, n) for n in ATTRIBUTE_CLASSES)
        self.places = nn.Linear(width, 6)

    def loss(self, features, labels, places):
        """Return the cross entropy of the attributes plus four times the mean squared error of the positions.

        Shapes: features (n, width), labels (n, 8), places (n, 6).
        """
        entropy = sum(F.cross_entropy(head(features), labels[:, i]) for i, head in enumerate(self.classes))
        return entropy + 4 * F.mse_loss(self.places(features), places)


# ---------------------------------------------------------------- networks

def make_tokenizer(folder: Path):
    """Return the CLIP byte-pair tokenizer in `folder`, or learn one in which every word of the captions is one token.

    A learned tokenizer is saved and reused: ties between merges are broken differently each time, and a text encoder
    only knows the token ids of the tokenizer that it was trained with.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if (folder / "tokenizer_config.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    words = {"a", "an", "on", "background", "above", "to", "the", "left", "of", "small", "large",
             *scenes.COLOURS, *scenes.BACKGROUNDS, *scenes.SHAPES}
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(sorted(words), trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}, ensure_ascii=False),
                                       encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True,
              "add_prefix_space": False, "errors": "replace", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions) -> torch.Tensor:
    """Return the token ids of captions, int (n, TOKENS), padded at the end."""
    return tokenizer(list(captions), padding="max_length", truncation=True, max_length=TOKENS,
                     return_tensors="pt").input_ids


def make_vae():
    """Return an untrained autoencoder from (3, 64, 64) images to (4, 16, 16) latents."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, sample_size=scenes.SIZE)


def make_features():
    """Return an untrained SqueezeNet 1.1. FID uses its 64 outputs, LPIPS uses its intermediate layers."""
    from torchvision.models import squeezenet1_1
    return squeezenet1_1(weights=None, num_classes=64, dropout=0.0)


def make_clip(tokenizer):
    """Return an untrained CLIP for 64 x 64 images and the tokens of `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel
    tower = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=64)
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                   pad_token_id=tokenizer.pad_token_id)
    text = dict(tower, num_hidden_layers=3, vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **special)
    vision = dict(tower, num_hidden_layers=4, image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_unet():
    """Return an untrained UNet for the latents of `make_vae`."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(
        sample_size=scenes.SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(48, 96, 128), norm_num_groups=4, cross_attention_dim=128, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def make_mmdit():
    """Return an untrained Stable Diffusion 3 transformer for the latents of `make_vae`.

    The weights of the modulation and of the output are zero, so that every block starts as the identity (Peebles and
    Xie, 2023, adaLN-Zero).
    """
    from diffusers import SD3Transformer2DModel
    mmdit = SD3Transformer2DModel(
        sample_size=scenes.SIZE // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=6,
        attention_head_dim=16, num_attention_heads=8, joint_attention_dim=256, caption_projection_dim=128,
        pooled_projection_dim=128, pos_embed_max_size=scenes.SIZE // 8, qk_norm="rms_norm")
    for name, module in mmdit.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return mmdit


class PaddedJointAttention:
    """Joint attention in which the last text token stands for T5_TOKENS equal tokens.

    Equal tokens stay equal in every block, so one token suffices. Adding log(T5_TOKENS) to its attention logits gives
    the token the softmax weight of T5_TOKENS tokens.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """Return (image tokens, text tokens) of the shapes given, as diffusers' JointAttnProcessor2_0 does."""
        def heads(tokens, project, norm):
            projected = project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return norm(projected) if norm is not None else projected

        streams = zip(zip((attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)),
                      zip((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                          (attn.norm_added_q, attn.norm_added_k, None)))
        query, key, value = (torch.cat([heads(hidden_states, *own), heads(encoder_hidden_states, *added)], 2)
                             for own, added in streams)
        weight = query.new_zeros(1, 1, 1, key.shape[2])
        weight[..., -1] = math.log(T5_TOKENS)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=weight).transpose(1, 2).flatten(2)
        own, added = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](own), added if attn.context_pre_only else attn.to_add_out(added)


def make_flow_scheduler():
    """Return the scheduler of shapes-mmdit."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def make_scheduler():
    """Return the scheduler of shapes-unet; its noise schedule is that of Stable Diffusion 1."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")


# ---------------------------------------------------------------- training

def fit(stage: str, work_dir: Path, module: nn.Module, loss_of, device) -> nn.Module:
    """Train `module` by RECIPE[stage] and return a copy with exponentially averaged weights, in eval mode.

    `loss_of(module, rng, batch_size)` returns the loss of one random batch. A checkpoint is saved every minute, and
    the training continues from the checkpoint in `work_dir` if there is one.
    """
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    steps, batch, peak, decay, target_loss = RECIPE[stage]
    path = work_dir / f"{stage}.pt"
    module.to(device).train()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = steps // 25
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / warmup) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))))
    parts = dict(module=module, average=average, optimizer=optimizer, scheduler=scheduler)
    step, running_loss = 0, None
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        step, running_loss = saved.pop("step"), saved.pop("running_loss", None)
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    saved_at = time.monotonic()
    bar = tqdm(total=steps, initial=step, desc=stage, mininterval=10)
    while step < steps and not (running_loss is not None and running_loss < target_loss):
        torch.manual_seed(step)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of(module, np.random.RandomState(step), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step >= warmup:
            average.update_parameters(module)
        step += 1
        running_loss = loss.item() if running_loss is None else running_loss + (loss.item() - running_loss) / 50
        bar.set_postfix(loss=f"{running_loss:.4f}", refresh=False)
        bar.update()
        if step == steps or running_loss < target_loss or time.monotonic() - saved_at > 60:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step, "running_loss": running_loss, **states}, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            saved_at = time.monotonic()
    return average.module.eval().requires_grad_(False)


def train_vae(work_dir, images, device):
    """Train the autoencoder with L1 loss, 4 times the squared error and 1e-6 times the KL divergence."""
    def loss_of(vae, rng, batch):
        x = pixels(images[rng.randint(len(images), size=batch)], device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - x
        return error.abs().mean() + 4 * error.square().mean() + 1e-6 * posterior.kl().mean()

    vae = make_vae().to(memory_format=torch.channels_last)
    return fit("vae", work_dir, vae, loss_of, device)


def train_features(work_dir, images, drawn, device):
    """Train the feature network to predict the attributes and positions of the scenes."""
    net = nn.ModuleDict({"net": make_features(), "heads": AttributeHeads(64)})
    labels, places = attributes(drawn).to(device), positions(drawn).to(device)

    def loss_of(net, rng, batch):
        rows = rng.randint(len(images), size=batch)
        return net["heads"].loss(net["net"](pixels(images[rows], device)), labels[rows], places[rows])

    net = fit("features", work_dir, net, loss_of, device)["net"]
    # The outputs are scaled to a mean square of 1, so that FID has the usual order of magnitude.
    with torch.no_grad():
        scale = net(pixels(images[:2048], device)).square().mean().sqrt()
    last = net.classifier[1]  # only a ReLU and a mean follow this layer, so scaling its weights scales the outputs
    last.weight /= scale
    last.bias /= scale
    return net


def train_clip(work_dir, tokenizer, images, drawn, device):
    """Train CLIP with the contrastive loss of Radford et al. (2021).

    All pairs in a batch that have equal captions are positives. A tenth of the loss of AttributeHeads is added.
    """
    captions = [s.caption for s in drawn]
    ids = tokenize(tokenizer, captions).to(device)
    _, same = np.unique(captions, return_inverse=True)
    same = torch.from_numpy(same.reshape(-1)).to(device)
    labels, places = attributes(drawn).to(device), positions(drawn).to(device)
    net = nn.ModuleDict({"clip": make_clip(tokenizer), "heads": AttributeHeads(128)})

    def loss_of(net, rng, batch):
        rows = rng.randint(len(images), size=batch)
        out = net["clip"](input_ids=ids[rows], pixel_values=pixels(images[rows], device))
        scale = net["clip"].logit_scale.exp().clamp(max=100)
        logits = scale * out.text_embeds.float() @ out.image_embeds.float().T
        target = (same[rows][:, None] == same[rows][None, :]).float()
        target /= target.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        class_token = out.vision_model_output.last_hidden_state[:, 0]
        return contrast + 0.1 * net["heads"].loss(class_token, labels[rows], places[rows])

    return fit("clip", work_dir, net, loss_of, device)["clip"]


@torch.no_grad()
def encode_images(vae, images, device):
    """Return the means of the latent distributions, float (n, 4, 16, 16), not scaled by scaling_factor."""
    return torch.cat([vae.encode(pixels(images[i:i + 64], device)).latent_dist.mean
                      for i in tqdm(range(0, len(images), 64), desc="latents")])


def load_latents(work_dir, vae, images, device):
    """Return the scaled mean latents of the training images, float (n, 4, 16, 16). They are encoded once and kept."""
    path = work_dir / "latents.pt"
    if not path.exists():
        torch.save(encode_images(vae, images, device).half().cpu(), path)
    return torch.load(path, map_location=device, weights_only=True).float() * vae.config.scaling_factor


def encode_captions(tokenizer, drawn, encode):
    """Encode the empty caption and each distinct caption once. Return the encodings and each scene's row in them.

    `encode(token ids)` returns a tuple of tensors with one row per caption; the encodings are a list of such tensors
    for all captions, in float16. Row 0 is the empty caption.
    """
    captions = ["", *sorted({s.caption for s in drawn})]
    row_of = {c: i for i, c in enumerate(captions)}
    ids = tokenize(tokenizer, captions)
    with torch.no_grad():
        parts = [encode(ids[i:i + 512]) for i in tqdm(range(0, len(ids), 512), desc="captions")]
    return [torch.cat(tensors).half() for tensors in zip(*parts)], np.array([row_of[s.caption] for s in drawn])


def train_unet(work_dir, tokenizer, text_encoder, vae, images, drawn, device):
    """Train the UNet to predict noise, with min-SNR-5 loss weights (Hang et al., 2023).

    A tenth of the captions is replaced by the empty caption, for classifier-free guidance.
    """
    latents = load_latents(work_dir, vae, images, device)
    (states,), caption_rows = encode_captions(
        tokenizer, drawn, lambda ids: (text_encoder(ids.to(device)).last_hidden_state,))
    scheduler = make_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    weight = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))

    def loss_of(unet, rng, batch):
        rows = rng.randint(len(latents), size=batch)
        texts = np.where(rng.rand(batch) < 0.1, 0, caption_rows[rows])
        t = torch.from_numpy(rng.randint(scheduler.config.num_train_timesteps, size=batch)).to(device)
        x = latents[rows]
        noise = torch.randn_like(x)
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t, encoder_hidden_states=states[texts].float()).sample
        return (weight[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    unet = make_unet().to(memory_format=torch.channels_last)
    return fit("unet", work_dir, unet, loss_of, device)


def train_mmdit(work_dir, tokenizer, clip, vae, images, drawn, device):
    """Train the transformer by rectified flow with logit-normal times (Esser et al., 2024).

    A tenth of the captions is replaced by the empty caption, for classifier-free guidance.
    """
    latents = load_latents(work_dir, vae, images, device)

    def encode(ids):
        out = clip.text_model(ids.to(device), output_hidden_states=True)
        return out.hidden_states[-2][:, :MMDIT_TOKENS], clip.text_projection(out.pooler_output)

    (states, pooled), caption_rows = encode_captions(tokenizer, drawn, encode)

    def loss_of(mmdit, rng, batch):
        rows = rng.randint(len(latents), size=batch)
        texts = np.where(rng.rand(batch) < 0.1, 0, caption_rows[rows])
        x = latents[rows]
        noise = torch.randn_like(x)
        sigma = torch.from_numpy(1 / (1 + np.exp(-rng.randn(batch)))).float().to(device)
        noisy = torch.lerp(x, noise, sigma[:, None, None, None])
        text = states[texts].float()
        text = F.pad(torch.cat([text, text], 2), (0, 0, 0, 1))  # twice the same encoder, then a zero token for T5
        predicted = mmdit(noisy, timestep=1000 * sigma, encoder_hidden_states=text,
                          pooled_projections=torch.cat([pooled[texts].float()] * 2, 1)).sample
        return F.mse_loss(predicted.float(), noise - x)

    mmdit = make_mmdit()
    original_processors = mmdit.attn_processors
    mmdit.set_attn_processor(PaddedJointAttention())
    mmdit = fit("mmdit", work_dir, mmdit, loss_of, device)
    mmdit.set_attn_processor(original_processors)
    return mmdit


# ---------------------------------------------------------------- export

def export_unet(vae, clip, unet, tokenizer_dir: Path, folder: Path):
    """Save shapes-unet to `folder` as a StableDiffusionPipeline with fp16 safetensors."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    text_encoder = CLIPTextModel(clip.config.text_config)
    tower = {f"text_model.{name}": value for name, value in clip.text_model.state_dict().items()}
    bare = {name[len("text_model."):]: value for name, value in tower.items()}
    text_encoder.load_state_dict(tower if set(tower) == set(text_encoder.state_dict()) else bare)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=CLIPTokenizer.from_pretrained(tokenizer_dir), unet=unet,
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    # A copy is converted to half precision, because the caller still uses the parts in single precision.
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    # Every version of transformers reads these parameter names; newer versions would save other names.
    save_file({name: value.half().contiguous() for name, value in tower.items()},
              folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(tokenizer_dir, folder / "tokenizer")


def export_mmdit(vae, clip, mmdit, tokenizer_dir: Path, folder: Path):
    """Save shapes-mmdit to `folder` as a StableDiffusion3Pipeline with fp16 safetensors.

    Its two text encoders are copies of the same one.
    """
    from diffusers import StableDiffusion3Pipeline
    from safetensors.torch import save_file
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tower = {f"text_model.{name}": value for name, value in clip.text_model.state_dict().items()}
    tower["text_projection.weight"] = clip.text_projection.weight
    text_encoder = CLIPTextModelWithProjection(clip.config.text_config)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    vae = copy.deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)  # StableDiffusion3Pipeline needs a number
    pipeline = StableDiffusion3Pipeline(
        transformer=mmdit, scheduler=make_flow_scheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=text_encoder, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None)
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for number in ("", "_2"):
        save_file({name: value.half().contiguous() for name, value in tower.items()},
                  folder / f"text_encoder{number}" / "model.safetensors", metadata={"format": "pt"})
        copy_tokenizer(tokenizer_dir, folder / f"tokenizer{number}", MMDIT_TOKENS)


def copy_tokenizer(source: Path, target: Path, tokens: int = TOKENS):
    """Copy the files of a tokenizer that every version of transformers reads, with `tokens` as its maximum length."""
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": tokens}, indent=2) + "\n")
    (target / "tokenizer.json").unlink(missing_ok=True)  # only newer versions of transformers write this file


def export_metrics(features, clip, tokenizer_dir: Path, folder: Path):
    """Save the metric networks to `folder` as fp16 safetensors."""
    from safetensors.torch import save_file

    copy.deepcopy(clip).half().save_pretrained(folder / "clip", safe_serialization=True)
    copy_tokenizer(tokenizer_dir, folder / "clip")
    processor = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
                 "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
                 "size": {"shortest_edge": scenes.SIZE}, "crop_size": {"height": scenes.SIZE, "width": scenes.SIZE},
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in features.state_dict().items()}, folder / "squeezenet.safetensors")


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model: str, count: int = 500) -> dict:
    """Return the figures of the model card, measured with the saved weights on `count` scenes of the prompts split."""
    from pruning import data
    from pruning.metrics import backbones, scores
    from pruning.models import generation, pipelines

    samples = data.load_samples("shapes", count)[0]
    captions = np.array([sample.caption for sample in samples])
    originals = data.load_originals(samples, scenes.SIZE)
    pipeline = pipelines.load_pipeline(model)
    settings = dict(pipelines.sampling_settings(pipeline, model), seed=0, batch_size=25)
    with tqdm(total=count, unit="image", desc="dense images") as bar:
        generated = generation.generate(pipeline, samples, on_batch=bar.update, **settings).pixels

    x = pixels(originals, "cpu")
    errors = [(pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) - part)
              .square().mean((1, 2, 3)) for part in x.split(50)]
    clip = backbones.load_backbone("bundled", "clip")
    texts, _ = backbones.embed_captions(clip, list(captions))
    clip_scores, retrieval = {}, {}
    for name, images in (("real", originals), ("dense", generated)):
        embedded = backbones.embed_images(clip, images)
        clip_scores[name] = float(scores.clip_score(embedded, texts).mean())
        retrieval[name] = float((captions[(embedded @ texts.T).argmax(1)] == captions).mean())
    features = backbones.load_backbone("bundled", "features")
    reference = scores.Reference(backbones.image_features(features, data.load_originals(
        data.reference_samples("shapes", samples), scenes.SIZE)))
    return {
        "scenes": count,
        "vae_psnr_db": float((10 * torch.log10(4 / torch.cat(errors))).mean()),
        "clip_score_real": clip_scores["real"], "clip_score_dense": clip_scores["dense"],
        "clip_score_dense_over_real": clip_scores["dense"] / clip_scores["real"],
        "retrieval_real": retrieval["real"], "retrieval_dense": retrieval["dense"],
        "retrieval_dense_over_real": retrieval["dense"] / retrieval["real"],
        "fid_dense": scores.fid(backbones.image_features(features, generated), reference).value,
        "fid_real": scores.fid(backbones.image_features(features, originals), reference).value,
    }


def main():
    """Train and export everything, or measure the figures of the model cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("shapes_training"),
                        help="folder for checkpoints and rendered scenes (default: shapes_training)")
    parser.add_argument("--output_dir", type=Path, default=HERE,
                        help="folder for the exported weights (default: the folder of this file)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument("--evaluate", action="store_true",
                        help="do not train; measure the saved weights and write figures.json")
    args = parser.parse_args()
    if args.evaluate:
        from pruning.models.pipelines import MODELS

        figures = json.dumps({model: {name: round(value, 4) for name, value in evaluate(model).items()}
                              for model in MODELS}, indent=2)
        (HERE / "figures.json").write_text(figures + "\n")
        print(figures)
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)

    images, drawn = load_split(args.work_dir, "train")
    tokenizer = make_tokenizer(args.work_dir / "tokenizer")
    vae = train_vae(args.work_dir, images, args.device)
    features = train_features(args.work_dir, images, drawn, args.device)
    clip = train_clip(args.work_dir, tokenizer, images, drawn, args.device)
    latents = encode_images(vae, images[:4096], args.device)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    unet = train_unet(args.work_dir, tokenizer, clip.text_model, vae, images, drawn, args.device)
    mmdit = train_mmdit(args.work_dir, tokenizer, clip, vae, images, drawn, args.device)
    export_unet(vae, clip, unet, args.work_dir / "tokenizer", args.output_dir / "shapes-unet")
    export_mmdit(vae, clip, mmdit, args.work_dir / "tokenizer", args.output_dir / "shapes-mmdit")
    export_metrics(features, clip, args.work_dir / "tokenizer", args.output_dir)


if __name__ == "__main__":
    main()
