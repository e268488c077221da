"""Scenes: every expression is read back from its English by a second implementation and points at one thing.

The reader below shares nothing with `ivt_utils.micro.scenes` but the names of the colors' values: it parses the
words with a grammar of its own, takes sizes and colors from what was measured, and counts which things the words fit.
"""

import random
import re

import pytest

from ivt_utils.micro import model as micro
from ivt_utils.micro import scenes

COUNT = 300  # scenes a subset
HEAD = re.compile(
    r"the(?: (?P<rank>leftmost|rightmost|highest|lowest|largest|smallest|second))?"
    r"(?: (?P<size>small|large))?(?: (?P<color>red|orange|yellow|green|blue|purple))?"
    r" (?P<noun>circle|square|triangle|star|cross|object)(?: from the (?P<side>left|right))?"
    r"(?: that is not (?:a (?P<other>circle|square|triangle|star|cross)|(?P<unlike>[a-z]+)))?"
)
CLAUSE = re.compile(
    r" (?:in the (?P<half>left|right|top|bottom) half|(?P<relation>left of|right of|above|below)"
    r" the (?:(?P<color>red|orange|yellow|green|blue|purple) )?(?P<noun>circle|square|triangle|star|cross))"
)


# --- the second implementation


def read(expression: str) -> tuple[dict, list[dict]]:
    """The head and the clauses of an expression; an assertion fails for English outside the grammar."""
    head = HEAD.match(expression)
    assert head, expression
    clauses, at = [], head.end()
    while at < len(expression):
        if clauses:
            assert expression.startswith(" and", at), expression
            at += len(" and")
        clause = CLAUSE.match(expression, at)
        assert clause, expression
        clauses.append(clause.groupdict())
        at = clause.end()
    words = head.groupdict()
    assert (words["rank"] == "second") == (words["side"] is not None), expression
    return words, clauses


def color_of(thing) -> str:
    """The named color that the painted one is nearest to."""
    return min(
        scenes.COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(thing.tint, scenes.COLORS[name], strict=True))
    )


def size_of(thing) -> str:
    width = thing.box[2] - thing.box[0]
    return "small" if width < 160 else "medium" if width < 265 else "large"


def middle(thing) -> tuple[float, float]:
    return (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2


def looks(thing, words: dict) -> bool:
    return (
        words["noun"] in ("object", thing.shape)
        and words["color"] in (None, color_of(thing))
        and words.get("size") in (None, size_of(thing))
        and words.get("other") != thing.shape
        and words.get("unlike") != color_of(thing)
    )


def offset(thing, clause: dict, things) -> float:
    """How far the thing lies on the side that the clause names, 0..1000; negative on the other side."""
    direction, anchor = clause["half"], (500, 500)
    if direction is None:
        landmarks = [other for other in things if looks(other, clause)]
        assert len(landmarks) == 1, f"the landmark of {clause} is one of {len(landmarks)} things"
        direction, anchor = clause["relation"], middle(landmarks[0])
    x, y = (a - b for a, b in zip(middle(thing), anchor, strict=True))
    return {"left": -x, "left of": -x, "right": x, "right of": x, "top": -y, "above": -y, "bottom": y, "below": y}[
        direction
    ]


RANKS = {
    "leftmost": lambda t: -middle(t)[0],
    "rightmost": lambda t: middle(t)[0],
    "highest": lambda t: -middle(t)[1],
    "lowest": lambda t: middle(t)[1],
    "largest": lambda t: t.box[2] - t.box[0],
    "smallest": lambda t: t.box[0] - t.box[2],
}


def pointed_at(expression: str, things, margin: float) -> list[int]:
    """The indices of the things that the words fit, "left of" and the like meaning at least `margin` of 1000.

    A superlative or a rank must be decided by a gap that can be seen (25 of 1000), or it fits nothing.
    """
    words, clauses = read(expression)
    fit = [i for i, thing in enumerate(things) if looks(thing, words)]
    fit = [i for i in fit if all(offset(things[i], clause, things) > margin for clause in clauses)]
    if words["rank"] is None:
        return fit
    if words["rank"] == "second":
        fit.sort(key=lambda i: middle(things[i])[0], reverse=words["side"] == "right")
        gaps = [abs(middle(things[a])[0] - middle(things[b])[0]) for a, b in zip(fit, fit[1:], strict=False)]
        return fit[1:2] if len(fit) > 1 and min(gaps[:2]) > 25 else []
    values = {i: RANKS[words["rank"]](things[i]) for i in fit}
    best = max(values.values(), default=0)
    return [i for i in fit if values[i] > best - 25]


# --- what it finds


def sampled(subset: str, count: int = COUNT):
    for i in range(count):
        rng = random.Random(f"property {subset} {i}")
        yield scenes.sample_questions(rng, subset, rng.randint(1 + (subset != "attributes"), 8), 3)


@pytest.mark.parametrize("subset", [*scenes.SUBSETS, "plain"])  # "plain": the micro student's first lessons
def test_every_expression_points_at_its_referent_and_at_nothing_else(subset):
    checked = 0
    for scene, questions in sampled(subset):
        for expression, target in questions:
            for margin in (25, 57, 90):  # from a lenient to a strict reading of the spatial words
                assert pointed_at(expression, scene.things, margin) == [target], expression
            checked += 1
    assert checked > 1.2 * COUNT


def test_the_reader_itself_can_tell_right_from_wrong():
    def thing(shape, color, x, y, side=120):
        return scenes.Thing(shape, color, "", (x, y, x + side, y + side), scenes.COLORS[color])

    things = [thing("star", "red", 100, 100), thing("star", "blue", 500, 120), thing("circle", "red", 800, 700, 300)]
    assert pointed_at("the star", things, 25) == [0, 1]
    assert pointed_at("the star that is not blue", things, 25) == [0]
    assert pointed_at("the red object that is not a star", things, 25) == [2]
    assert pointed_at("the large object", things, 25) == [2]
    assert pointed_at("the object left of the circle and below the red star", things, 10) == [1]
    assert pointed_at("the object left of the circle and below the red star", things, 25) == []
    assert pointed_at("the second object from the left", things, 25) == [1]
    assert pointed_at("the rightmost star in the top half", things, 25) == [1]
    assert pointed_at("the highest star", things, 25) == [0, 1]  # 20 of 1000 apart: nobody can tell
    with pytest.raises(AssertionError, match="one of 2 things"):
        pointed_at("the circle above the star", things, 25)
    for nonsense in ("a star", "the star near the circle", "the second star", "the star in the left half above"):
        with pytest.raises(AssertionError):
            read(nonsense)


def test_each_subset_has_its_kind_of_expression():
    texts = {s: [e for _, questions in sampled(s) for e, _ in questions] for s in scenes.SUBSETS}

    def share(subset, pattern):
        return sum(bool(re.search(pattern, text)) for text in texts[subset]) / len(texts[subset])

    spatial = r"left of|right of|above|below"
    assert share("attributes", spatial) > 0.1 and share("attributes", "small|large") > 0.05
    assert share("attributes", "most|highest|lowest|largest|smallest|second|not") == 0
    assert share("distractors", "that is not") > 0.05
    assert share("distractors", "most|highest|lowest|largest|smallest") > 0.2
    assert share("distractors", "second") > 0.02 and share("distractors", spatial) == 0
    assert share("compositional", spatial) > 0.7 and share("compositional", " and ") > 0.2
    length = {s: sum(len(text.split()) for text in texts[s]) / len(texts[s]) for s in texts}
    assert length["distractors"] < length["compositional"] and length["attributes"] < length["compositional"]


def test_distractors_hold_several_things_of_one_category():
    crowded = [
        max(sum(t.shape == s for t in scene.things) for s in scenes.SHAPES) / len(scene.things)
        for scene, _ in sampled("distractors", 60)
    ]
    assert min(crowded) >= 0.5


def test_a_distractor_expression_has_no_word_that_it_could_do_without():
    for scene, questions in sampled("distractors"):
        for expression, target in questions:
            words, _ = read(expression)
            if words["rank"] is None:
                for word in (words["size"], words["color"]):
                    shorter = expression.replace(f" {word}", "", 1)
                    assert word is None or pointed_at(shorter, scene.things, 25) != [target], expression


# --- scenes


@pytest.mark.parametrize("subset", scenes.SUBSETS)
def test_nothing_leaves_the_image_and_little_is_covered(subset):
    seen = []
    for scene, _ in sampled(subset):
        for i, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000 and x2 - x1 == pytest.approx(y2 - y1)
            assert color_of(thing) == thing.color and size_of(thing) == thing.size and thing.shape in scenes.SHAPES
            covered = 0.0
            for j, other in enumerate(scene.things):
                if i != j:
                    a, b = thing.box, other.box
                    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
                    assert overlap < 0.12 * min(thing.side**2, other.side**2)
                    covered += overlap * (j > i)
            seen.append(1 - covered / thing.side**2)
    assert min(seen) > 0.6 and sum(share == 1 for share in seen) > 0.6 * len(seen)


def test_a_seed_gives_the_same_scene_expressions_and_picture():
    for subset in scenes.SUBSETS:
        first, second = (scenes.sample_questions(random.Random(f"{subset} again"), subset, 6, 2) for _ in range(2))
        assert first == second
        assert scenes.draw_scene(first[0]).tobytes() == scenes.draw_scene(second[0]).tobytes()
    assert len({scenes.sample_questions(random.Random(i), "attributes", 6, 1)[0] for i in range(5)}) == 5


def test_every_word_is_in_the_students_vocabulary():
    known = {word.strip() for word in micro.expression_words()}
    said = {word for subset in scenes.SUBSETS for _, qs in sampled(subset) for text, _ in qs for word in text.split()}
    assert said <= known
    assert known - said <= {"medium"}  # nobody says it, and every other word is used


def test_a_scene_has_at_most_the_things_asked_for():
    for count in range(1, 9):
        scene = scenes.sample_scene(random.Random(count), "compositional", count)
        assert 1 <= len(scene.things) <= count


# --- drawing


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("side", [105, 240, 400])
def test_what_is_drawn_fills_its_box(shape, side):
    import numpy as np

    thing = scenes.Thing(shape, "blue", "large", (300, 200, 300 + side, 200 + side), scenes.COLORS["blue"])
    image = np.asarray(scenes.draw_scene(scenes.Scene((thing,), ("plain", (240,) * 3, (230,) * 3)), 400), int)
    ys, xs = np.nonzero(abs(image - 240).sum(-1) > 60)
    found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 400 * 1000
    assert abs(found - thing.box).max() < 0.03 * side + 4  # the outline is drawn on the edge


def test_a_picture_is_rgb_of_the_size_asked_for_and_shows_the_colors():
    for scene, _ in sampled("compositional", 10):
        image = scenes.draw_scene(scene)
        assert image.mode == "RGB" and image.size == (192, 192)
        for i, thing in enumerate(scene.things):
            x, y = middle(thing)
            if not any(o.box[0] < x < o.box[2] and o.box[1] < y < o.box[3] for o in scene.things[i + 1 :]):
                pixel = image.getpixel((int(x * 0.192), int(y * 0.192)))
                assert max(abs(a - b) for a, b in zip(pixel, thing.tint, strict=True)) <= 2


def test_backgrounds_are_light_and_of_several_kinds():
    kinds = {scene.background[0] for subset in scenes.SUBSETS for scene, _ in sampled(subset, 30)}
    assert kinds == {"plain", "gradient", "stripes", "checks", "dots"}
    for scene, _ in sampled("attributes", 30):
        assert min(min(color) for color in scene.background[1:]) > 160
