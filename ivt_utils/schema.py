"""The forms of what is stored: a record of the data, a rollout with its steps, and a cell of a table."""

from typing import Any, NotRequired, TypedDict

from ivt_utils.boxes import Box


class Record(TypedDict):
    """One sample of a data set: an image, an expression, and the box that it refers to, four numbers 0..1000."""

    id: str
    image_id: str
    subset: str
    image: Any  # PIL, RGB
    expression: str
    bbox: list[float]


class Step(TypedDict):
    """One answer of a rollout. Its words ("text") are left out where only boxes are shipped."""

    box: Box | None
    text: NotRequired[str]
    shown: NotRequired[Box | None]  # the box on the image before it, where that was not the answer before
    likelihood: NotRequired[float | None]  # of `confidence`, as the next one
    fits: NotRequired[float | None]


class Rollout(TypedDict):
    """One sample with its T + 1 answers; the truth is four numbers 0..1000."""

    id: str
    image_id: str
    subset: str
    truth: list[float]
    steps: list[Step]
    expression: NotRequired[str]


class Cell(TypedDict):
    """A value with the limits of its 95% interval; n in samples. The first three are floats, or None."""

    value: Any
    low: Any
    high: Any
    n: int
