"""Seven common corruptions of one image at five severities.

Kinds and severities are those of ImageNet-C and CIFAR-10-C (Hendrycks & Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019; tables: `create_c/make_imagenet_c.py` and
`make_cifar_c.py` of github.com/hendrycks/robustness). The first is for 224 pixels and far stronger than the second,
which is for 32; an image takes the table whose size is nearer to its own, and lengths in pixels grow with the image.

At 32 pixels that scale is not strictly one of strength: motion blur at 3 and 4 is the same to the eye, and spatter
goes from water (1 to 3) to mud (4 and 5), whose severity 4 changes fewer pixels than 3.

What differs from the published files: values are rounded, not cut off; the drops of "spatter" are shaded by their
depth instead of OpenCV's edge filters; an image whose channels are equal gets equal noise and gray drops, so it
stays gray.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["DISTORTIONS", "SEVERITIES", "distort"]

SEVERITIES: Final = (1, 2, 3, 4, 5)
SMALL, LARGE = 32, 224  # pixels of the images that the two tables were made for


class Trail(NamedTuple):
    """A motion blur: half its length and the standard deviation of its weights, in pixels."""

    radius: int
    sigma: float


class Drops(NamedTuple):
    """A field of normal noise that is smoothed; drops lie where it passes the threshold."""

    mean: float
    deviation: float
    sigma: float  # of the smoothing, in pixels
    threshold: float
    strength: float  # of water: its opacity where it is deepest; of mud: how far its edge is smoothed, in pixels
    mud: bool


_TABLES: Final[Mapping[str, Mapping[int, tuple[Any, ...]]]] = {
    "gaussian_noise": {SMALL: (0.04, 0.06, 0.08, 0.09, 0.10), LARGE: (0.08, 0.12, 0.18, 0.26, 0.38)},
    "impulse_noise": {SMALL: (0.01, 0.02, 0.03, 0.05, 0.07), LARGE: (0.03, 0.06, 0.09, 0.17, 0.27)},
    "motion_blur": {
        SMALL: (Trail(6, 1), Trail(6, 1.5), Trail(6, 2), Trail(8, 2), Trail(9, 2.5)),
        LARGE: (Trail(10, 3), Trail(15, 5), Trail(15, 8), Trail(15, 12), Trail(20, 15)),
    },
    "pixelate": {SMALL: (0.95, 0.9, 0.85, 0.75, 0.65), LARGE: (0.6, 0.5, 0.4, 0.3, 0.25)},
    "spatter": {
        SMALL: (
            Drops(0.62, 0.1, 0.7, 0.7, 0.5, False),
            Drops(0.65, 0.1, 0.8, 0.7, 0.5, False),
            Drops(0.65, 0.3, 1.0, 0.69, 0.5, False),
            Drops(0.65, 0.1, 0.7, 0.69, 0.6, True),
            Drops(0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
        LARGE: (
            Drops(0.65, 0.3, 4, 0.69, 0.6, False),
            Drops(0.65, 0.3, 3, 0.68, 0.6, False),
            Drops(0.65, 0.3, 2, 0.68, 0.5, False),
            Drops(0.65, 0.3, 1, 0.65, 1.5, True),
            Drops(0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    },
    "contrast": {SMALL: (0.75, 0.5, 0.4, 0.3, 0.15), LARGE: (0.4, 0.3, 0.2, 0.1, 0.05)},
    "jpeg_compression": {SMALL: (80, 65, 58, 50, 40), LARGE: (25, 18, 15, 10, 7)},
}
_WATER, _MUD = np.float32([175, 238, 238]), np.float32([63, 42, 20])
_LUMA: Final = np.float32([0.299, 0.587, 0.114])
_SOLID: Final = 0.8  # mud thinner than this is left out


def distort(image: np.ndarray, kind: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The corrupted image, uint8 of the same shape.

    Args:
        image: uint8 [C, H, W], C = 1 or 3; three equal channels are treated as one.
        kind: one of `DISTORTIONS`.
        severity: 1 to 5.
        rng: all randomness; each kind draws the same numbers at every severity.
    """
    channels = len(image)
    image = np.ascontiguousarray(image)  # sums round by the order of what they add, so it must be one order
    if channels == 3 and (image[0] == image[1]).all() and (image[0] == image[2]).all():
        image = image[:1]
    side = min(image.shape[1:])
    reference = SMALL if side * side < SMALL * LARGE else LARGE
    strength = _TABLES[kind][reference][severity - 1]
    found = DISTORTIONS[kind](image, strength, side / reference, rng)
    return np.broadcast_to(found, (channels, *found.shape[1:]))


def _gaussian_noise(image: np.ndarray, deviation: float, zoom: float, rng: np.random.Generator) -> np.ndarray:
    return _as_bytes(image + np.float32(255 * deviation) * rng.standard_normal(image.shape, np.float32))


def _impulse_noise(image: np.ndarray, share: float, zoom: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper, alike often, in a share of the values."""
    hit, salt = rng.random(image.shape, np.float32) < share, rng.integers(0, 2, image.shape, np.uint8)
    return np.where(hit, 255 * salt, image)


def _motion_blur(image: np.ndarray, trail: Trail, zoom: float, rng: np.random.Generator) -> np.ndarray:
    """Half a Gaussian along a line within 45° of the horizontal, as ImageMagick's motion blur has it."""
    angle = np.deg2rad(rng.uniform(-45, 45))
    steps = np.arange(2 * max(1, round(trail.radius * zoom)) + 1)
    weights = np.exp(-(steps**2) / (2 * (trail.sigma * zoom) ** 2))
    moves = [(round(step * np.sin(angle)), round(step * np.cos(angle))) for step in steps]
    return _as_bytes(_blend(image.astype(np.float32), moves, weights / weights.sum()))


def _pixelate(image: np.ndarray, share: float, zoom: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[1:]
    picture = _as_picture(image)
    small = picture.resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return _as_array(small.resize((width, height), Image.Resampling.BOX))


def _spatter(image: np.ndarray, drops: Drops, zoom: float, rng: np.random.Generator) -> np.ndarray:
    """Drops of pale turquoise water, or of brown mud."""
    noise = rng.standard_normal((1, *image.shape[1:]), np.float32)
    kernel = _gaussian(drops.sigma * zoom)
    # Smoothed noise deviates by Σk²; in units of that, drops cover the same share of an image of any size.
    level = (drops.threshold - drops.mean) / (drops.deviation * (_gaussian(drops.sigma) ** 2).sum())
    depth = np.maximum(_smooth(noise, kernel) / np.float32((kernel**2).sum()) - np.float32(level), 0)
    if not depth.any():
        return image
    color = (_MUD if drops.mud else _WATER)[:, None, None]
    if len(image) == 1:
        color = np.tensordot(_LUMA, color, 1)[None]
    if not drops.mud:
        return _as_bytes(image + np.float32(drops.strength) * depth / depth.max() * color)
    cover = _smooth((depth > 0).astype(np.float32), _gaussian(drops.strength * zoom))
    cover = np.where(cover < _SOLID, np.float32(0), cover)
    return _as_bytes(image * (1 - cover) + color * cover)


def _contrast(image: np.ndarray, share: float, zoom: float, rng: np.random.Generator) -> np.ndarray:
    means = image.mean((1, 2), np.float32, keepdims=True)
    return _as_bytes((image - means) * np.float32(share) + means)


def _jpeg_compression(image: np.ndarray, quality: int, zoom: float, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    _as_picture(image).save(file, "JPEG", quality=quality)
    return _as_array(Image.open(file))


Distortion = Callable[[np.ndarray, Any, float, np.random.Generator], np.ndarray]
DISTORTIONS: Final[Mapping[str, Distortion]] = {
    "motion_blur": _motion_blur,
    "impulse_noise": _impulse_noise,
    "gaussian_noise": _gaussian_noise,
    "pixelate": _pixelate,
    "spatter": _spatter,
    "contrast": _contrast,
    "jpeg_compression": _jpeg_compression,
}


def _blend(image: np.ndarray, moves: list[tuple[int, int]], weights: np.ndarray) -> np.ndarray:
    """Σᵢ wᵢ · image moved by moves[i] = (rows, columns); beyond the border its edge goes on."""
    height, width = image.shape[1:]
    down, right = (max(abs(move[axis]) for move in moves) for axis in (0, 1))
    padded = np.pad(image, ((0, 0), (down, down), (right, right)), mode="edge")
    total = np.zeros_like(image)
    for (row, column), weight in zip(moves, weights.astype(np.float32)):
        top, left = down + row, right + column
        total += weight * padded[:, top : top + height, left : left + width]
    return total


def _gaussian(sigma: float) -> np.ndarray:
    """Weights of a Gaussian, cut off at four deviations."""
    steps = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    return weights / weights.sum()


def _smooth(field: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    steps = range(-(len(kernel) // 2), len(kernel) // 2 + 1)
    return _blend(_blend(field, [(step, 0) for step in steps], kernel), [(0, step) for step in steps], kernel)


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _as_picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)) if len(image) == 3 else image[0])


def _as_array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
