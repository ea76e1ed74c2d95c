"""Shapes: small drawn scenes with exact captions, the data of the bundled models.

A scene is one or two coloured shapes on a plain background, 64 x 64 pixels. It
is a pure function of (split, index), so the data set is stored as code. No two
splits share a caption, and therefore no two splits share a scene.
"""
from __future__ import annotations

import math
import zlib
from typing import NamedTuple, Tuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
OVERSAMPLE = 4  # scenes are drawn four times as large and then reduced, which antialiases the edges

COLOURS = {
    "red": (216, 38, 44),
    "orange": (247, 140, 28),
    "yellow": (250, 222, 50),
    "green": (42, 158, 66),
    "blue": (40, 90, 214),
    "purple": (134, 58, 180),
    "pink": (246, 138, 190),
    "black": (32, 32, 36),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "beige": (232, 214, 178),
    "grey": (152, 152, 158),
    "mint": (184, 230, 204),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": (8.0, 10.0), "large": (18.0, 22.0), "": (11.0, 13.5)}  # size word -> range of radii in pixels

# split -> (number of scenes, last digits of the captions' hashes). Each digit belongs to one split.
SPLITS = {
    "train": (40_000, range(2, 10)),
    "reference": (2_048, range(1, 2)),
    "prompts": (512, range(0, 1)),
}


class Object(NamedTuple):
    """One coloured shape."""

    colour: str
    shape: str
    size: str  # "small", "large", or "" if the scene has two objects
    x: float  # of the centre, in pixels
    y: float
    radius: float  # in pixels


class Scene(NamedTuple):
    """The content of an image, and the caption that describes it."""

    caption: str
    background: str
    relation: str  # "", "above" or "to the left of"
    objects: Tuple[Object, ...]


def scene(split: str, index: int) -> Scene:
    """Return the scene at `index` of a split. Raises IndexError if `index` is not in [0, number of scenes)."""
    count, tenths = SPLITS[split]
    if not 0 <= index < count:
        raise IndexError(f"split {split!r} has {count} scenes, so there is no scene {index}")
    # numpy keeps the stream of RandomState the same in all releases, so the scenes are the same too.
    rng = np.random.RandomState([list(SPLITS).index(split), index])
    while True:
        drawn = _draw_scene(rng)
        if zlib.crc32(drawn.caption.encode()) % 10 in tenths:
            return drawn


def _draw_scene(rng: np.random.RandomState) -> Scene:
    def pick(options):
        return options[rng.randint(len(options))]

    def place(size, x, y, jitter_x, jitter_y):
        return Object(pick(list(COLOURS)), pick(SHAPES), size, x + rng.uniform(-jitter_x, jitter_x),
                      y + rng.uniform(-jitter_y, jitter_y), rng.uniform(*RADII[size]))

    background = pick(list(BACKGROUNDS))
    relation = pick(("", "above", "above", "to the left of", "to the left of"))
    if relation == "":
        objects = (place(pick(("small", "large")), 32, 32, 9, 9),)
    elif relation == "above":
        objects = (place("", 32, 17, 14, 2), place("", 32, 47, 14, 2))
    else:
        objects = (place("", 17, 32, 2, 14), place("", 47, 32, 2, 14))
    nouns = [" ".join(word for word in ("a", o.size, o.colour, o.shape) if word) for o in objects]
    article = "an" if objects[0].colour == "orange" and not objects[0].size else "a"
    nouns[0] = article + nouns[0][1:]
    if len(nouns) == 2 and objects[1].colour == "orange":
        nouns[1] = "an" + nouns[1][1:]
    caption = f"{f' {relation} '.join(nouns)} on a {background} background"
    return Scene(caption, background, relation, objects)


def render(drawn: Scene) -> Image.Image:
    """Return the RGB image of a scene, SIZE x SIZE pixels."""
    image = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2, BACKGROUNDS[drawn.background])
    canvas = ImageDraw.Draw(image)
    for o in drawn.objects:
        _draw_object(canvas, o, BACKGROUNDS[drawn.background])
    return image.reduce(OVERSAMPLE)


def _draw_object(canvas: ImageDraw.ImageDraw, o: Object, background: Tuple[int, int, int]) -> None:
    x, y, r = (value * OVERSAMPLE for value in (o.x, o.y, o.radius))
    colour = COLOURS[o.colour]

    def disc(radius, fill):
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)

    def polygon(angles_and_radii):
        canvas.polygon([(x + length * math.sin(angle), y - length * math.cos(angle))
                        for angle, length in angles_and_radii], fill=colour)

    if o.shape == "circle":
        disc(r, colour)
    elif o.shape == "ring":
        disc(r, colour)
        disc(0.5 * r, background)
    elif o.shape == "square":
        side = 0.86 * r
        canvas.rectangle([x - side, y - side, x + side, y + side], fill=colour)
    elif o.shape == "triangle":
        polygon([(2 * math.pi * k / 3, 1.15 * r) for k in range(3)])
    elif o.shape == "star":
        polygon([(math.pi * k / 5, 1.15 * r if k % 2 == 0 else 0.46 * r) for k in range(10)])
    else:  # cross
        arm = 0.36 * r
        canvas.rectangle([x - r, y - arm, x + r, y + arm], fill=colour)
        canvas.rectangle([x - arm, y - r, x + arm, y + r], fill=colour)
