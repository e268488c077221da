"""Synthetic referring expressions: scenes of shapes, and expressions that single out one shape.

Three subsets mirror the paper's three sets: `attributes` (attributes and one relation, as RefCOCOg),
`distractors` (several things of one category, minimal expressions and negation, as Ref-Adv-s) and `compositional`
(long expressions over widely varying sizes, as Ref-L4). All coordinates are 0..1000 relative to the image.
An expression is kept only when exactly one thing fits it, with a margin on every spatial word.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SUBSETS = ("attributes", "distractors", "compositional")
COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (245, 208, 60),
    "green": (46, 160, 82),
    "blue": (52, 110, 214),
    "purple": (140, 72, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIDES = {"small": (105, 150), "medium": (180, 235), "large": (290, 400)}  # side of the box, 0..1000
WIDE_SIDES = {"small": (75, 130), "medium": (170, 240), "large": (300, 480)}  # the compositional subset
RELATIONS = ("left of", "right of", "above", "below")
SUPERLATIVES = ("leftmost", "rightmost", "highest", "lowest", "largest", "smallest")
HALVES = ("in the left half", "in the right half", "in the top half", "in the bottom half")
MOST_COVERED = 0.12  # of the smaller one of two things
EDGE_SHADE, EDGE = 0.62, 0.045  # of a shape: how bright beside its color, and how thick beside its side
STRICT, LENIENT = 90, 25  # a spatial word is true beyond STRICT, false within LENIENT, and unusable between


@dataclass(frozen=True)
class Thing:
    """One shape: its words, and its box as (x1, y1, x2, y2) floats 0..1000."""

    shape: str
    color: str
    size: str
    box: tuple[float, float, float, float]
    tint: tuple[int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def side(self) -> float:
        return self.box[2] - self.box[0]


@dataclass(frozen=True)
class Scene:
    """Things in drawing order (later ones lie on top) on a background `(kind, color, second color)`."""

    things: tuple[Thing, ...]
    background: tuple


@dataclass(frozen=True)
class Form:
    """The meaning of an expression; every field that is None says nothing."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    not_color: str | None = None
    not_shape: str | None = None
    superlative: str | None = None
    ordinal: str | None = None  # "left" or "right": the second one counted from there
    place: str | None = None
    relations: tuple = ()  # ((relation, Form of the landmark), ...)


# ---------------------------------------------------------------------------------------------- scenes
def sample_scene(rng: random.Random, subset: str, count: int) -> Scene:
    """Return a random scene of at most `count` things (fewer when they find no room)."""
    sides = WIDE_SIDES if subset == "compositional" else SIDES
    shapes, colors = SHAPES, tuple(COLORS)
    if subset == "distractors":  # one or two categories, few colors: attributes alone rarely suffice
        shapes = rng.sample(SHAPES, rng.choice((1, 1, 2)))
        colors = rng.sample(colors, rng.choice((2, 3, 4)))
    things: list[Thing] = []
    for _ in range(count * 12):
        if len(things) == count:
            break
        size = rng.choices(tuple(sides), (4, 3, 2))[0]
        side = rng.uniform(*sides[size])
        if box := free_box(rng, side, things):
            color = rng.choice(colors)
            red, green, blue = (min(255, max(0, c + rng.randint(-18, 18))) for c in COLORS[color])
            things.append(Thing(rng.choice(shapes), color, size, box, (red, green, blue)))
    return Scene(tuple(things), sample_background(rng))


def free_box(rng: random.Random, side: float, things: list[Thing]) -> tuple | None:
    """Return a random square box with sides of `side`, or None when it hides or is hidden by one of `things`."""
    x, y = rng.uniform(8, 992 - side), rng.uniform(8, 992 - side)
    box = (x, y, x + side, y + side)
    return box if all(_covered(box, other.box) < MOST_COVERED for other in things) else None


def _covered(a, b) -> float:
    """Return the overlap of two boxes as a share of the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(w, 0) * max(h, 0) / smaller


def sample_background(rng: random.Random) -> tuple:
    light = rng.randint(205, 248)
    first = tuple(min(255, light + rng.randint(-10, 10)) for _ in range(3))
    second = tuple(max(0, c - rng.randint(8, 26)) for c in first)
    return rng.choice(("plain", "gradient", "stripes", "checks", "dots")), first, second


# ---------------------------------------------------------------------------------------------- drawing
def draw_scene(scene: Scene, size: int = 192, oversample: int = 2) -> Image.Image:
    """Return the scene as an RGB image of `size` x `size` pixels, anti-aliased by `oversample`."""
    wide = size * oversample
    image = Image.new("RGB", (wide, wide), scene.background[1])
    draw = ImageDraw.Draw(image)
    _draw_background(draw, wide, scene.background)
    for thing in scene.things:
        edge = tuple(int(c * EDGE_SHADE) for c in thing.tint)
        x1, y1, x2, y2 = (v * wide / 1000 for v in thing.box)
        line = max(2, round((x2 - x1) * EDGE))
        if thing.shape == "circle":
            draw.ellipse((x1, y1, x2, y2), fill=thing.tint, outline=edge, width=line)
        else:
            points = [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in OUTLINES[thing.shape]]
            draw.polygon(points, fill=thing.tint)
            draw.line([*points, points[0]], fill=edge, width=line, joint="curve")
    return image.reduce(oversample)


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, angle = (1.0 if i % 2 == 0 else 0.45), math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


_A, _B = 0.32, 0.68
OUTLINES = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "star": _star(),
    "cross": [
        (_A, 0),
        (_B, 0),
        (_B, _A),
        (1, _A),
        (1, _B),
        (_B, _B),
        (_B, 1),
        (_A, 1),
        (_A, _B),
        (0, _B),
        (0, _A),
        (_A, _A),
    ],
}


def _draw_background(draw: ImageDraw.ImageDraw, wide: int, background: tuple) -> None:
    kind, first, second = background
    step = wide // 12
    if kind == "gradient":
        for y in range(0, wide, 4):
            mix = y / wide
            color = tuple(int(a * (1 - mix) + b * mix) for a, b in zip(first, second, strict=True))
            draw.rectangle((0, y, wide, y + 4), fill=color)
    elif kind == "stripes":
        for x in range(-wide, wide, 2 * step):
            draw.line((x, 0, x + wide, wide), fill=second, width=step // 2)
    elif kind == "checks":
        for i in range(0, 12):
            for j in range(i % 2, 12, 2):
                draw.rectangle((i * step, j * step, (i + 1) * step - 1, (j + 1) * step - 1), fill=second)
    elif kind == "dots":
        for i in range(0, 12):
            for j in range(0, 12):
                x, y, r = (i + 0.5) * step, (j + 0.5) * step, step * 0.16
                draw.ellipse((x - r, y - r, x + r, y + r), fill=second)


# ---------------------------------------------------------------------------------------------- meaning
def referents(scene: Scene, form: Form, margin: float) -> list[int]:
    """Return the indices of the things that fit `form`, spatial words holding beyond `margin` (0..1000)."""
    fit = [i for i, thing in enumerate(scene.things) if _has_attributes(thing, form)]
    for relation, landmark in form.relations:
        anchors = referents(scene, landmark, LENIENT)
        if len(anchors) != 1:
            return []
        anchor = scene.things[anchors[0]]
        fit = [i for i in fit if i != anchors[0] and _related(scene.things[i], anchor, relation, margin)]
    if form.place:
        fit = [i for i in fit if _placed(scene.things[i], form.place, margin)]
    if form.superlative and fit:
        fit = _extreme(scene, fit, form.superlative, margin)
    if form.ordinal and fit:
        fit = _second(scene, fit, form.ordinal, margin)
    return fit


def is_unique(scene: Scene, form: Form, target: int) -> bool:
    """Return whether `form` singles out `target` under both the strict and the lenient reading."""
    return referents(scene, form, STRICT) == [target] == referents(scene, form, LENIENT)


def _has_attributes(thing: Thing, form: Form) -> bool:
    return (
        form.shape in (None, thing.shape)
        and form.color in (None, thing.color)
        and form.size in (None, thing.size)
        and form.not_color != thing.color
        and form.not_shape != thing.shape
    )


def _related(thing: Thing, anchor: Thing, relation: str, margin: float) -> bool:
    dx, dy = thing.center[0] - anchor.center[0], thing.center[1] - anchor.center[1]
    distance = dict(zip(RELATIONS, (-dx, dx, -dy, dy), strict=True))[relation]
    return distance > margin


def _placed(thing: Thing, place: str, margin: float) -> bool:
    dx, dy = thing.center[0] - 500, thing.center[1] - 500
    distance = dict(zip(HALVES, (-dx, dx, -dy, dy), strict=True))[place]
    return distance > margin


def _extreme(scene: Scene, fit: list[int], superlative: str, margin: float) -> list[int]:
    """Return the most extreme thing of `fit`; under the strict reading, only when it leads by the margin."""

    def score(i):
        (x, y), side = scene.things[i].center, scene.things[i].side
        return {"leftmost": -x, "rightmost": x, "highest": -y, "lowest": y, "largest": side, "smallest": -side}[
            superlative
        ]

    ranked = sorted(fit, key=score, reverse=True)
    if margin == STRICT and len(ranked) > 1 and score(ranked[0]) - score(ranked[1]) < STRICT / 2:
        return []
    return ranked[:1] if len(ranked) > 1 else []  # "the largest" of one thing says nothing


def _second(scene: Scene, fit: list[int], side: str, margin: float) -> list[int]:
    ranked = sorted(fit, key=lambda i: scene.things[i].center[0], reverse=side == "right")
    xs = [scene.things[i].center[0] for i in ranked]
    if len(ranked) < 3 or (
        margin == STRICT and min(abs(a - b) for a, b in zip(xs, xs[1:3], strict=False)) < STRICT / 2
    ):
        return []
    return ranked[1:2]


# ---------------------------------------------------------------------------------------------- words
def to_text(form: Form) -> str:
    """Return the English of a form, such as "the small red circle above the blue star"."""
    words = ["the"]
    words += [form.superlative] if form.superlative else ["second"] if form.ordinal else []
    words += [word for word in (form.size, form.color) if word]
    words.append(form.shape or "object")
    text = " ".join(words)
    if form.ordinal:
        text += f" from the {form.ordinal}"
    if form.not_color or form.not_shape:
        text += " that is not " + (form.not_color or f"a {form.not_shape}")
    parts = [form.place] if form.place else []
    parts += [f"{relation} {to_text(landmark)}" for relation, landmark in form.relations]
    return " ".join([text, " and ".join(parts)]) if parts else text


# ---------------------------------------------------------------------------------------------- expressions
def sample_form(rng: random.Random, scene: Scene, subset: str, tries: int = 40) -> tuple[Form, int] | None:
    """Return (meaning of an expression, index of its referent), or None when none of this subset was found."""
    for _ in range(tries):
        target = rng.randrange(len(scene.things))
        form = _propose(rng, scene, target, subset)
        if form and is_unique(scene, form, target):
            if subset in ("attributes", "distractors"):
                form = _shorten(rng, scene, form, target, subset == "distractors")
            return form, target
    return None


def _propose(rng: random.Random, scene: Scene, target: int, subset: str) -> Form | None:
    thing = scene.things[target]
    named = Form(shape=thing.shape, color=thing.color)
    size = thing.size if thing.size != "medium" else None  # nobody says "the medium circle"
    if subset == "plain":  # the student's first lessons, not part of the benchmark
        return replace(named, **rng.choice(({}, {"shape": None}, {"color": None})))
    if subset == "attributes":
        kind = rng.choices(("plain", "size", "place", "relation"), (4, 2, 2, 3))[0]
        if kind == "plain":
            return named
        if kind == "size":
            return replace(named, size=size)
        if kind == "place":
            return replace(named, place=rng.choice(HALVES))
        return replace(named, color=rng.choice((thing.color, None)), relations=_landmarks(rng, scene, target, 1))
    if subset == "distractors":
        kind = rng.choices(("plain", "not", "most", "second", "place", "size"), (3, 3, 4, 1.5, 2, 2))[0]
        base = replace(named, color=rng.choice((thing.color, None)))
        if kind == "plain":
            return named
        if kind == "not":
            others = [t for t in scene.things if t is not thing]
            if not others:
                return None
            other = rng.choice(others)
            if other.color != thing.color:
                return Form(shape=thing.shape, size=rng.choice((None, size)), not_color=other.color)
            return Form(color=thing.color, not_shape=other.shape) if other.shape != thing.shape else None
        if kind == "most":
            return replace(base, superlative=rng.choice(SUPERLATIVES))
        if kind == "second":
            return replace(base, ordinal=rng.choice(("left", "right")))
        if kind == "place":
            return replace(base, place=rng.choice(HALVES))
        return replace(base, size=size)
    return replace(
        named,
        size=size,
        color=rng.choice((thing.color, thing.color, None)),
        place=rng.choice((None, None, *HALVES)),
        relations=_landmarks(rng, scene, target, rng.choice((1, 1, 2))),
    )


def _landmarks(rng: random.Random, scene: Scene, target: int, count: int) -> tuple:
    """Return up to `count` true (relation, landmark) pairs about the target."""
    thing, pairs = scene.things[target], []
    others = [i for i in range(len(scene.things)) if i != target]
    for i in rng.sample(others, min(count, len(others))):
        landmark = Form(shape=scene.things[i].shape, color=scene.things[i].color)
        true = [r for r in RELATIONS if _related(thing, scene.things[i], r, STRICT)]
        if true:
            pairs.append((rng.choice(true), landmark))
    return tuple(pairs)


def _shorten(rng: random.Random, scene: Scene, form: Form, target: int, always: bool) -> Form:
    """Return the form without words it does not need: all of them, or (not `always`) half of the time."""
    for field in rng.sample(("size", "color", "place", "superlative", "shape"), 5):
        without = replace(form, **{field: None})
        if getattr(form, field) and (always or rng.random() < 0.5) and is_unique(scene, without, target):
            form = without
    return form


def sample_forms(rng: random.Random, subset: str, count: int, questions: int):
    """Return (scene, [(Form, index), ...]) with between 1 and `questions` different expressions."""
    while True:
        scene = sample_scene(rng, subset, count)
        found: dict[str, tuple[Form, int]] = {}
        for _ in range(questions * 2):
            if scene.things and len(found) < questions and (pair := sample_form(rng, scene, subset)):
                found[to_text(pair[0])] = pair
        if found:
            return scene, list(found.values())


def sample_questions(rng: random.Random, subset: str, count: int, questions: int):
    """Return (scene, [(expression, index), ...]) with between 1 and `questions` different expressions."""
    scene, found = sample_forms(rng, subset, count, questions)
    return scene, [(to_text(form), target) for form, target in found]
