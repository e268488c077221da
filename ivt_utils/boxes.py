"""Boxes: 0..1000 <-> pixels, IoU, and the JSON answer `{"bbox_2d": [x1, y1, x2, y2]}`.

A predicted box is a tuple of four integers 0..1000, relative to the image as the user gave it (Qwen3-VL's
convention; Qwen2.5-VL used absolute pixels after resizing).
"""

import json
import math
import re

import numpy as np

Box = tuple[int, int, int, int]
SCALE = 1000
_KEY, _OBJECT = "bbox_2d", re.compile(r'\{(?=[ \t\r\n]*")')  # an object with anything in it begins so
_BEGUN = re.compile(rf'"{_KEY}"\s*:')


def to_pixels(box, width: int, height: int) -> tuple[float, float, float, float]:
    """Return a 0..1000 box as (x1, y1, x2, y2) in pixels of an image of `width` x `height`."""
    x1, y1, x2, y2 = box
    return x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE


def from_pixels(xyxy, width: int, height: int, grid: int = 1) -> Box:
    """Return a pixel box as integers 0..1000, rounded to multiples of `grid` and clipped to the image."""
    if width <= 0 or height <= 0:
        raise ValueError(f"The image size {width} x {height} is not positive; a box needs an image.")
    x1, y1, x2, y2 = xyxy
    scaled = x1 / width * SCALE, y1 / height * SCALE, x2 / width * SCALE, y2 / height * SCALE
    return snap(scaled, grid)


def snap(box, grid: int = 1) -> Box:
    """Return four numbers 0..1000 as integers on multiples of `grid`, at least one grid step wide and high."""
    if not all(math.isfinite(v) for v in box):
        raise ValueError(f"The box {tuple(box)} has a coordinate that is not a finite number.")
    x1, y1, x2, y2 = (min(SCALE, max(0, grid * math.floor(v / grid + 0.5))) for v in box)
    x1, y1 = min(x1, SCALE - grid), min(y1, SCALE - grid)
    return x1, y1, max(x2, x1 + grid), max(y2, y1 + grid)


def view(box, zoom: float, least: int) -> Box:
    """Return the part of the image that a closer look around `box` shows, itself a box of the image.

    Its width and height are `zoom` times the longer side of `box`, at least `least` (0..1000) and at most the image,
    and it stays within the image. All of the image for a box that is None. ValueError for a `zoom` below 1.
    """
    if zoom < 1:
        raise ValueError(f"A closer look is at least as large as its box: zoom {zoom} is below 1.")
    if box is None:
        return 0, 0, SCALE, SCALE
    side = min(SCALE, max(least, round(zoom * max(box[2] - box[0], box[3] - box[1]))))
    x, y = (min(max(0, (low + high - side) // 2), SCALE - side) for low, high in (box[::2], box[1::2]))
    return x, y, x + side, y + side


def from_view(box, part: Box) -> Box:
    """Return a box that is relative (0..1000) to a part of the image as a box of the image."""
    return snap([low + v * (high - low) / SCALE for v, low, high in zip(box, part[:2] * 2, part[2:] * 2, strict=True)])


def to_view(box, part: Box, grid: int = 1) -> Box:
    """Return a box of the image as one relative to a part of it (0..1000), clipped there."""
    ends = zip(box, part[:2] * 2, part[2:] * 2, strict=True)
    return snap([(v - low) * SCALE / (high - low) for v, low, high in ends], grid)


def iou(a, b) -> float:
    """Return the IoU of two xyxy boxes in the same frame, 0 to 1; 0.0 when either is None or both are empty."""
    return float(ious([a], [b])[0])


def ious(boxes_a, boxes_b) -> np.ndarray:
    """Return the IoU of each box with the one at the same place of the other list, shape (n,), 0 where one is None."""
    missing = [math.nan] * 4
    a, b = (
        np.array([missing if box is None else box for box in boxes], dtype=float).reshape(-1, 4)
        for boxes in (boxes_a, boxes_b)
    )
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    overlap = np.clip(sides, 0, None).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - overlap
    return np.divide(overlap, union, out=np.zeros(len(a)), where=union > 0)


def parse_answer(text: str) -> Box | None:
    """Return the one committed box of a model's answer, or None when there is no such box.

    The box is the value of the key "bbox_2d" in a JSON object, which may stand in other text or JSON and hold further
    keys, such as a label. What a JSON string says is no box.

    None for: no answer, more than one, not four plain integers, out of 0..1000, or reversed (x2 <= x1 or y2 <= y1).
    Nothing is guessed, and the function never raises: an answer that does not parse scores 0.
    """
    return _committed(text)[0]


def answer_start(text: str) -> int:
    """Return where in an answer the JSON object with its one box begins, 0 where `parse_answer` finds none."""
    return _committed(text)[1]


def _committed(text) -> tuple[Box | None, int]:
    """Return what `parse_answer` and `answer_start` do."""
    if not isinstance(text, str):
        return None, 0
    found, inside, start = [], [], 0
    decoder = json.JSONDecoder(
        strict=False, object_pairs_hook=lambda pairs: inside.extend(value for key, value in pairs if key == _KEY)
    )
    rest, at = [], 0
    while begins := _OBJECT.search(text, at):
        inside.clear()
        rest.append(text[at : begins.start()])
        try:
            at = decoder.raw_decode(text, begins.start())[1]
            found += inside
            start = begins.start() if inside else start
        except RecursionError:
            return None, 0
        except ValueError:  # no whole object begins here, but one may further in
            at = begins.end()
    begun = any(_BEGUN.search(part) for part in (*rest, text[at:]))  # an answer that is no whole object
    return (tuple(found[0]), start) if len(found) == 1 and not begun and valid(found[0]) else (None, 0)


def valid(box) -> bool:
    """Return whether `box` is four integers 0..1000 with x1 < x2 and y1 < y2."""
    if not isinstance(box, tuple | list) or len(box) != 4:
        return False
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= SCALE for v in box):
        return False
    return box[0] < box[2] and box[1] < box[3]


def format_answer(box: Box) -> str:
    """Return the answer text of a box, in the form that the prompt asks for."""
    if not valid(box):
        raise ValueError(f"{box} is not a box of four integers 0..1000 with x1 < x2 and y1 < y2.")
    return f'{{"bbox_2d": [{", ".join(map(str, box))}]}}'
