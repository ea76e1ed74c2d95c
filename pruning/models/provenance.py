"""What decides a number: fingerprints of networks, versions of code and packages, and hashes of all that made an image.

Records keep these texts. Two numbers compare only if the texts agree.
"""
from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Tuple

ROOT = Path(__file__).resolve().parents[2]
# Names in configs that say where a component came from, and not what it does.
PASSING = {"name_or_path", "transformers_version", "torch_dtype", "dtype"}
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "lpips", "numpy", "pillow")


def provenance_hash(**origin) -> str:
    """Return a hash of everything in `origin`, 32 hex digits."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint(module) -> str:
    """Return the class of a torch module and a hash of its weights, to tell models apart.

    The hash covers every tensor's name and shape and about 4,096 of its values.
    """
    import torch
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{type(module).__name__} {digest.hexdigest()[:12]}"


def fingerprint_rest(pipeline, denoiser: str) -> str:
    """Return a hash of the weights of all modules of a pipeline except its denoiser, named `denoiser`."""
    import torch
    parts = sorted((name, fingerprint(part)) for name, part in pipeline.components.items()
                   if isinstance(part, torch.nn.Module) and name != denoiser)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def fingerprint_configs(pipeline) -> str:
    """Return a hash of all that decides a pipeline's pixels beside weights: classes and configs of its components.

    It covers the config of the pipeline itself, and all that tokenizers know. Where files lie and which versions wrote
    them does not count: records hold the versions.
    """
    own = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
    parts = {name: None if part is None else (type(part).__name__, _config_of(part))
             for name, part in pipeline.components.items()}
    return provenance_hash(pipeline=type(pipeline).__name__, own=_settled(own), parts=parts)[:12]


def _config_of(part) -> Any:
    """Return the config of a component, or what a tokenizer knows."""
    if hasattr(part, "get_vocab"):
        return [_rules_of(part), sorted(part.get_vocab().items()), part.special_tokens_map, part.model_max_length,
                part.padding_side, part.truncation_side]
    config = getattr(part, "config", part)  # processors of images are their own config
    return _settled(config.to_dict() if hasattr(config, "to_dict") else dict(config))


def _rules_of(tokenizer) -> Any:
    """Return how a tokenizer splits text, for those written in Rust, by SentencePiece, and in Python."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}  # set by each call
    if hasattr(tokenizer, "sp_model"):
        return hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
    return sorted(getattr(tokenizer, "bpe_ranks", {}).items())


def _settled(config) -> Any:
    """Return a config without private names, paths, versions and dtypes, which say how it came here."""
    if isinstance(config, dict):
        return {name: _settled(value) for name, value in config.items()
                if not str(name).startswith("_") and name not in PASSING}
    return [_settled(value) for value in config] if isinstance(config, (list, tuple)) else config


def source_hash(module) -> str:
    """Return a hash of the source text of a Python module, 12 hex digits."""
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]


def folder_hash(folder: Path) -> str:
    """Return a hash of the source texts of the Python files in a folder, 12 hex digits."""
    texts = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def machine(device: str) -> Dict[str, Any]:
    """Return the name of the device that computes, and torch's number of threads."""
    import torch
    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    return {"device": f"cpu ({platform.machine()})", "threads": torch.get_num_threads()}


def package_versions() -> Dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def release(package: str) -> Tuple[int, ...]:
    """Return the major and minor version of an installed package."""
    return tuple(map(int, metadata.version(package).split(".")[:2]))


def code_version() -> str:
    """Return the git commit of this code and whether files differ from it, or 'unknown' if this is not a clone."""
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
