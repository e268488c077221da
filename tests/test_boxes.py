"""Boxes: whatever a model writes gives one valid box or none, and a box survives every way of writing it down."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ivt_utils import boxes

COORDINATE = st.integers(0, 1000)


@st.composite
def valid_boxes(draw):
    x1, x2 = sorted(draw(st.lists(COORDINATE, min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(COORDINATE, min_size=2, max_size=2, unique=True)))
    return x1, y1, x2, y2


PIECES = st.sampled_from(
    [
        '{"bbox_2d": [',
        '{"bbox_2d":[',
        "]}",
        "]",
        "}",
        "{",
        "[",
        ", ",
        ",",
        " ",
        "\n",
        '"',
        "0",
        "10",
        "1000",
        "1001",
        "9" * 30,
        "-5",
        "1.5",
        "1e3",
        "NaN",
        "Infinity",
        "null",
        "true",
        "٣",
        "１２",
        "²",
        "\x00",
        "It is",
    ]
)
ALMOST_ANSWERS = st.lists(PIECES, max_size=14).map("".join)
NUMBERS = st.lists(
    st.one_of(st.integers(-2000, 2000), st.floats(), st.none(), st.booleans(), st.text(max_size=3)), max_size=6
)


def answer(inside: str) -> str:
    return '{"bbox_2d": [' + inside + "]}"


@settings(max_examples=400)
@given(st.one_of(st.text(), ALMOST_ANSWERS, NUMBERS.map(lambda n: json.dumps({"bbox_2d": n}))))
@example(answer("1, 2, 3, 4" * 10_000))
@example("{" * 50_000)
@example('{"bbox_2d": [' * 5_000)
def test_any_text_gives_none_or_a_valid_box(text):
    box = boxes.parse_answer(text)
    assert box is None or (type(box) is tuple and boxes.valid(box))


@given(valid_boxes(), st.text(st.characters(blacklist_characters='{}[]"'), max_size=20))
def test_an_answer_is_read_as_it_was_written(box, trace):
    assert boxes.parse_answer(boxes.format_answer(box)) == box
    assert boxes.parse_answer(f"{trace} {boxes.format_answer(box)}{trace}") == box
    assert json.loads(boxes.format_answer(box)) == {"bbox_2d": list(box)}


@given(st.lists(st.integers(-50, 1050), max_size=6))
def test_a_list_of_integers_is_a_box_exactly_when_it_is_valid(numbers):
    parsed = boxes.parse_answer(answer(", ".join(map(str, numbers))))
    valid = len(numbers) == 4 and all(0 <= v <= 1000 for v in numbers)
    valid = valid and numbers[0] < numbers[2] and numbers[1] < numbers[3]
    assert parsed == (tuple(numbers) if valid else None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        answer(""),
        answer("10, 20, 30"),
        answer("10, 20, 30, 40, 50"),
        answer("10, 20, 30, "),
        answer("30, 20, 10, 40"),
        answer("10, 40, 30, 20"),
        answer("10, 20, 10, 40"),
        answer("10, 20, 30, 20"),
        answer("-10, 20, 30, 40"),
        answer("10, 20, 30, 1001"),
        answer("10, 20, 30, " + "9" * 5000),
        answer("NaN, 20, 30, 40"),
        answer("10, 20, Infinity, 40"),
        answer("10.0, 20, 30, 40"),
        answer("1e1, 20, 30, 40"),
        answer("10 20 30 40"),
        answer("1 0, 20, 30, 40"),
        answer("١٠, ٢٠, ٣٠, ٤٠"),
        answer("１０, 20, 30, 40"),
        answer("[10, 20, 30, 40]"),
        answer("010, 20, 30, 40"),
        answer("00, 20, 30, 40"),
        answer("+10, 20, 30, 40"),
        answer('"10", 20, 30, 40'),
        answer("10, 20, 30, 40")[:-1],
        '{"bbox_2d": "10, 20, 30, 40"}',
        '{"bbox": [10, 20, 30, 40]}',
        "[10, 20, 30, 40]",
        '{"bbox_2d": [10, 20, 30, 40], "score": 1}',
        '{"label": "a", "bbox_2d": [10, 20, 30, 40]}',
        answer("10, 20, 30, 40") * 2,
        answer("10, 20, 30, 40") + answer("NaN"),
        answer("1") + answer("10, 20, 30, 40"),
        '{"bbox_2d": ' + answer("10, 20, 30, 40") + "}",
    ],
)
def test_no_box_is_guessed(text):
    assert boxes.parse_answer(text) is None


def test_the_label_that_qwen_puts_behind_a_box_does_no_harm():
    labeled = '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "the red star"}]\n```'
    assert boxes.parse_answer(labeled) == (10, 20, 30, 40)
    assert boxes.parse_answer(labeled * 2) is None


@pytest.mark.parametrize("value", [None, 3, b'{"bbox_2d": [1, 2, 3, 4]}', ["a"], {"bbox_2d": [1, 2, 3, 4]}])
def test_what_is_not_text_holds_no_box(value):
    assert boxes.parse_answer(value) is None


@pytest.mark.parametrize(
    "box",
    [
        None,
        (),
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        (3, 2, 1, 4),
        (1, 4, 3, 2),
        (0, 0, 0, 5),
        (0, 0, 1001, 5),
        (-1, 0, 5, 5),
        (1.0, 2, 3, 4),
        (float("nan"), 2, 3, 4),
        (False, True, 3, 4),
        "1234",
        ("1", "2", "3", "4"),
    ],
)
def test_what_is_no_box_cannot_be_written(box):
    assert not boxes.valid(box)
    with pytest.raises(ValueError, match="is not a box"):
        boxes.format_answer(box)


# --- pixels


@given(valid_boxes(), st.integers(1, 6000), st.integers(1, 6000))
def test_to_pixels_and_back(box, width, height):
    pixels = boxes.to_pixels(box, width, height)
    assert 0 <= pixels[0] < pixels[2] <= width + 1e-9 and 0 <= pixels[1] < pixels[3] <= height + 1e-9
    assert boxes.from_pixels(pixels, width, height) == box


@given(
    st.lists(st.floats(-9000, 9000), min_size=4, max_size=4),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from((1, 10)),
)
def test_from_pixels_is_a_valid_box_on_the_grid_next_to_the_pixels(xyxy, width, height, grid):
    box = boxes.from_pixels(xyxy, width, height, grid)
    assert boxes.valid(box) and all(v % grid == 0 for v in box)
    if 0 <= xyxy[0] < xyxy[2] <= width and 0 <= xyxy[1] < xyxy[3] <= height:
        scaled = (xyxy[0] / width, xyxy[1] / height, xyxy[2] / width, xyxy[3] / height)
        assert all(abs(v - 1000 * s) <= grid + 1e-6 for v, s in zip(box, scaled, strict=True))


def test_pixels_follow_width_and_height():
    assert boxes.to_pixels((100, 200, 500, 1000), 640, 480) == (64, 96, 320, 480)
    assert boxes.from_pixels((64, 96, 320, 480), 640, 480) == (100, 200, 500, 1000)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 10)])
def test_an_image_without_pixels_has_no_box(size):
    with pytest.raises(ValueError, match="is not positive"):
        boxes.from_pixels((0, 0, 1, 1), *size)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_coordinate_that_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="not a finite number"):
        boxes.snap((0, 0, bad, 1))


@given(valid_boxes())
def test_snap_leaves_a_box_on_its_grid_alone(box):
    assert boxes.snap(box) == box
    assert boxes.snap(boxes.snap(box, 10), 10) == boxes.snap(box, 10)


# --- IoU


def plain_iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


@given(valid_boxes(), valid_boxes())
def test_iou_is_symmetric_and_the_share_of_the_union(a, b):
    assert boxes.iou(a, b) == boxes.iou(b, a) == pytest.approx(plain_iou(a, b), abs=1e-12)
    assert 0 <= boxes.iou(a, b) <= 1
    assert boxes.iou(a, a) == 1


def test_iou_of_no_box_is_zero():
    box = (0, 0, 10, 10)
    assert boxes.iou(None, box) == boxes.iou(box, None) == boxes.iou(None, None) == 0.0
    assert boxes.iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0
    assert boxes.iou(box, [0, 0, 10.0, 20.0]) == 0.5
