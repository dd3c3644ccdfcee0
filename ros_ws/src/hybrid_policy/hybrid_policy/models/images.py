"""Resize with padding, to the last bit as openpi's client does it (PIL's bilinear filter), without PIL.

PIL widens the triangle filter when it shrinks an image (so it does not alias), works in 22-bit fixed
point, and rounds to uint8 after the horizontal pass and again after the vertical one. The same here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError

_BITS = 22  # PIL's PRECISION_BITS: 32 - 8 - 2


@lru_cache(maxsize=64)
def _filter(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Source places and fixed-point weights of each target pixel: two [taps, target]."""
    scale = source / target
    widened = max(scale, 1.0)
    taps = math.ceil(widened) * 2 + 1
    places = np.zeros((taps, target), dtype=np.intp)
    weights = np.zeros((taps, target), dtype=np.int32)
    for i in range(target):
        center = (i + 0.5) * scale
        first = max(int(center - widened + 0.5), 0)
        last = min(int(center + widened + 0.5), source)
        raw = [max(0.0, 1.0 - abs((x - center + 0.5) / widened)) for x in range(first, last)]
        total = sum(raw)
        for k, value in enumerate(raw):
            places[k, i] = first + k
            weights[k, i] = int(0.5 + value / total * (1 << _BITS))
    used = int(np.flatnonzero(weights.sum(axis=1)).max()) + 1
    return places[:used], weights[:used]


def _resample_rows(image: NDArray[np.uint8], target: int) -> NDArray[np.uint8]:
    """Resize the first axis: uint8 [n, m, 3] -> [target, m, 3]."""
    if image.shape[0] == target:
        return image
    places, weights = _filter(image.shape[0], target)
    rows = image.reshape(image.shape[0], -1)
    total = np.full((target, rows.shape[1]), 1 << (_BITS - 1), dtype=np.int32)
    for place, weight in zip(places, weights):
        total += rows[place] * weight[:, None]
    total >>= _BITS
    return total.astype(np.uint8).reshape(target, *image.shape[1:])


def resize_with_pad(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Fit an image into ``height`` x ``width`` without distortion, centred on black.

    Args:
        image: uint8 [any height, any width, 3].

    Returns:
        uint8 [height, width, 3]; the image itself where the size is right already.

    Raises:
        InputError: another dtype or form, or no pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image: {image.dtype} {image.shape} given, expected uint8 [height, width, 3]")
    high, wide = image.shape[:2]
    if (high, wide) == (height, width):
        return image
    ratio = max(wide / width, high / height)
    new_height, new_width = int(high / ratio), int(wide / ratio)
    if new_height < 1 or new_width < 1:
        raise InputError(f"image: {high} x {wide} is too thin to fit into {height} x {width}")
    across = image
    if wide != new_width:  # the horizontal pass as rows of the transposed image
        across = cv2.transpose(_resample_rows(cv2.transpose(np.ascontiguousarray(image)), new_width))
    fitted = _resample_rows(across, new_height)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padded = np.zeros((height, width, 3), dtype=np.uint8)
    padded[top : top + new_height, left : left + new_width] = fitted
    return padded
