"""The tables of the metrics: METRICS says what each metric means, BACKBONES which networks compute it.

The tables load without torch. The metrics themselves are in scores.py, the networks in backbones.py, 95 % intervals in
intervals.py, and the costs of a denoiser in costs.py.
"""
from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple

from pruning import UserError


class Metric(NamedTuple):
    """What the numbers of a metric mean, and how they are shown."""

    help: str
    better: str  # "higher" or "lower"
    per_image: bool  # True: a value for each image, and their mean is the metric. False: one value for the whole set
    unit: str = ""
    backbone: Optional[str] = None  # the family of networks in BACKBONES that computes the metric
    # What an image is compared with: its "caption", the "reference" (a set of real images), the "original" image of its
    # caption, the "dense" model's image from the same noise, or "" for nothing.
    against: str = ""
    interval: Optional[str] = None  # the 95 % interval: of the "difference" to dense image by image, or of the "value"
    bounds: Tuple[float, float] = (-math.inf, math.inf)  # of its values; an interval never leaves them
    relative: str = "ratio"  # how it is drawn relative to dense: "ratio", "value", "1 - value", or "" if not at all
    biased: bool = False  # biased upward for few images; left out of figures if there are fewer images than features
    cost: bool = False  # what pruning should save; every other metric is about quality
    optional: bool = False  # measured only if --metrics names it, because its network is large

    @property
    def needs_originals(self) -> bool:
        """Whether the metric compares with real images."""
        return self.against in ("reference", "original")


METRICS = {
    "clip_score": Metric("how well each image matches its caption: cosine similarity of their CLIP embeddings",
                         better="higher", per_image=True, unit="100·cos", backbone="clip", against="caption",
                         interval="difference", bounds=(-100, 100)),
    "kid": Metric("kernel distance between the features of the generated and of the reference images; unbiased for any "
                  "number of images, so it can be negative",
                  better="lower", per_image=False, unit="1000·MMD²", backbone="features", against="reference",
                  interval="value", relative=""),
    "cmmd": Metric("kernel distance between the CLIP embeddings of the generated and of the reference images; unbiased "
                   "for any number of images, so it can be negative",
                   better="lower", per_image=False, unit="1000·MMD²", backbone="clip", against="reference",
                   interval="value", relative=""),
    "fid": Metric("Fréchet distance between the features of the generated and of the reference images; biased upward "
                  "for few images",
                  better="lower", per_image=False, backbone="features", against="reference", biased=True),
    "lpips": Metric("perceptual distance between each image and the original image of its caption",
                    better="lower", per_image=True, backbone="lpips", against="original", interval="difference",
                    bounds=(0, math.inf)),
    "lpips_dense": Metric("perceptual distance between each image and the dense model's image from the same noise",
                          better="lower", per_image=True, backbone="lpips", against="dense", interval="value",
                          bounds=(0, math.inf), relative="1 - value"),
    "ssim_dense": Metric("structural similarity of each image and the dense model's image from the same noise",
                         better="higher", per_image=True, against="dense", interval="value", bounds=(-1, 1),
                         relative="value"),
    "psnr_dense": Metric("peak signal-to-noise ratio of each image and the dense model's image from the same noise",
                         better="higher", per_image=True, unit="dB", against="dense", interval="value",
                         bounds=(0, math.inf), relative=""),
    "generation_time": Metric("mean time to generate an image",
                              better="lower", per_image=False, unit="s/image", cost=True),
    "pick_score": Metric("how well people would like each image for its caption, as PickScore predicts from choices of "
                         "people between two images",
                         better="higher", per_image=True, unit="scale·cos", backbone="preference", against="caption",
                         interval="difference", optional=True),
    "image_reward": Metric("how highly people would rank each image for its caption, as ImageReward predicts from "
                           "rankings by people; its zero means nothing, so it can be negative",
                           better="higher", per_image=True, backbone="reward", against="caption",
                           interval="difference", relative="", optional=True),
}
DEFAULT = tuple(name for name, metric in METRICS.items() if not metric.optional)  # measured if --metrics names none

# The names that records show beside the numbers. Numbers are comparable only if these names agree. Optional metrics may
# have a standard network alone.
BACKBONES = {
    "bundled": {
        "clip": "bundled shapes-clip",
        "features": "bundled shapes-squeezenet (64 outputs)",
        "lpips": "bundled shapes-squeezenet (unweighted)",
    },
    "standard": {
        "clip": "standard openai/clip-vit-base-patch16@57c21647",
        "features": "standard Inception-v3 (torch-fidelity, 2048 features)",
        "lpips": "standard AlexNet (LPIPS 0.1)",
        "preference": "standard yuvalkirstain/PickScore_v1",
        "reward": "standard THUDM/ImageReward",
    },
}


def check_networks(names: Sequence[str], kind: str) -> None:
    """Raise UserError if a kind of BACKBONES has no network for one of these metrics."""
    lacking = [name for name in names if METRICS[name].backbone not in (None, *BACKBONES[kind])]
    if lacking:
        raise UserError(f"the {kind} metric backbones have no network for {' and '.join(lacking)}: give "
                        "--metric_backbones standard, or leave it out of --metrics")
