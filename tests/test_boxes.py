"""Boxes: whatever a model writes gives one valid box or none, and a box survives every way of writing it down."""

import json
import time
from itertools import product

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
        answer("10, 20, 30, 40") * 2,
        answer("10, 20, 30, 40") + answer("NaN"),
        answer("1") + answer("10, 20, 30, 40"),
        '{"bbox_2d": ' + answer("10, 20, 30, 40") + "}",
    ],
)
def test_no_box_is_guessed(text):
    assert boxes.parse_answer(text) is None


BOX = (100, 200, 300, 400)
SHAPES = {  # what students of the Hub write, and where a box may hide
    "cookbook_fence_list_one": ('```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "red cup"}\n]\n```', BOX),
    "plain": ('{"bbox_2d": [100, 200, 300, 400]}', BOX),
    "nospace": ('{"bbox_2d":[100,200,300,400]}', BOX),
    "pretty_object": ('{\n  "bbox_2d": [100, 200, 300, 400]\n}', BOX),
    "pretty_object_label_fence": ('```json\n{\n  "bbox_2d": [100, 200, 300, 400],\n  "label": "red cup"\n}\n```', BOX),
    "label_first": ('{"label": "red cup", "bbox_2d": [100, 200, 300, 400]}', BOX),
    "label_quote_escaped": ('{"bbox_2d": [100, 200, 300, 400], "label": "sign that says \\"stop\\""}', BOX),
    "label_zh": ('```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "红色的杯子"}\n]\n```', BOX),
    "zh_comma": ('{"bbox_2d": [100，200，300，400]}', None),
    "description_key": ('{"bbox_2d": [100, 200, 300, 400], "description": "red cup"}', BOX),
    "confidence": ('{"bbox_2d": [100, 200, 300, 400], "label": "cup", "confidence": 0.9}', BOX),
    "point": ('{"point_2d": [200, 300], "label": "cup"}', None),
    "floats": ('{"bbox_2d": [100.0, 200.0, 300.0, 400.0]}', None),
    "pixels_over": ('{"bbox_2d": [100, 200, 1300, 1400]}', None),
    "trailing_comma_inner": ('{"bbox_2d": [100, 200, 300, 400,]}', None),
    "list_two": (
        '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "cup"},'
        '\n\t{"bbox_2d": [500, 200, 600, 400], "label": "cup"}\n]\n```',
        None,
    ),
    "think_quotes": (
        'The first box {"bbox_2d": [10, 20, 30, 40]} is too far left. {"bbox_2d": [100, 200, 300, 400]}',
        None,
    ),
    "nested_list": ('{"bbox_2d": [[100, 200, 300, 400]]}', None),
    "bare_list": ("[100, 200, 300, 400]", None),
    "extra_brace": ('{{"bbox_2d": [100, 200, 300, 400]}}', BOX),
    "truncated": ('```json\n[\n\t{"bbox_2d": [100, 200, 300', None),
    "single_quotes": ("{'bbox_2d': [100, 200, 300, 400]}", None),
    "reversed": ('{"bbox_2d": [300, 400, 100, 200]}', None),
    "string_box": ('{"bbox_2d": "100, 200, 300, 400"}', None),
    "leading_zero": ('{"bbox_2d": [010, 020, 030, 040]}', None),
    "tool_call": (
        '<tool_call>\n{"name": "draw_box", "arguments": {"bbox_2d": [100, 200, 300, 400]}}\n</tool_call>',
        BOX,
    ),
    "crlf": ('```json\r\n[\r\n\t{"bbox_2d": [100, 200, 300, 400], "label": "cup"}\r\n]\r\n```', BOX),
    "label_truncated": ('```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "the man in the', None),
    "spaced key": ('{ "bbox_2d" : [ 100 , 200 , 300 , 400 ] }', BOX),
    "tabs": ('{\t"bbox_2d":\t[100,\t200,\t300,\t400]}', BOX),
    "one number a line": ('{"bbox_2d": [\n100,\n200,\n300,\n400\n]}', BOX),
    "braces in a label": ('{"bbox_2d": [100, 200, 300, 400], "label": "a {red} cup }"}', BOX),
    "braces in a label before": ('{"label": "}{", "bbox_2d": [100, 200, 300, 400]}', BOX),
    "the key in a label": ('{"bbox_2d": [100, 200, 300, 400], "label": "the \\"bbox_2d\\" sign"}', BOX),
    "a label that is the key": ('{"bbox_2d": [100, 200, 300, 400], "label": "bbox_2d"}', BOX),
    "an answer in a label": ('{"label": "{\\"bbox_2d\\": [1, 2, 3, 4]}", "bbox_2d": [100, 200, 300, 400]}', BOX),
    "only in a label": ('{"label": "{\\"bbox_2d\\": [100, 200, 300, 400]}"}', None),
    "arguments as a string": ('{"name": "draw_box", "arguments": "{\\"bbox_2d\\": [100, 200, 300, 400]}"}', None),
    "a backslash ends a label": ('{"bbox_2d": [100, 200, 300, 400], "label": "a\\\\"}', BOX),
    "a label of two lines": ('{"bbox_2d": [100, 200, 300, 400], "label": "red\ncup"}', BOX),
    "half a surrogate": ('{"bbox_2d": [100, 200, 300, 400], "label": "\\ud800"}', BOX),
    "half a surrogate as it is": ('{"bbox_2d": [100, 200, 300, 400], "label": "\ud800"}', BOX),
    "inside an object": ('{"answer": {"bbox_2d": [100, 200, 300, 400]}}', BOX),
    "inside lists": ('{"answers": [[{"bbox_2d": [100, 200, 300, 400]}]]}', BOX),
    "further objects": ('{"id": 1} {"bbox_2d": [100, 200, 300, 400]} {}', BOX),
    "the label has its own object": ('{"bbox_2d": [100, 200, 300, 400], "label": {"text": "cup"}}', BOX),
    "quotes and braces around": ('The "{red} cup" {is} {"here": {"bbox_2d": [100, 200, 300, 400]} "}', BOX),
    "the list breaks off behind it": ('[{"bbox_2d": [100, 200, 300, 400]}, {"la', BOX),
    "the next box breaks off": ('[{"bbox_2d": [100, 200, 300, 400]}, {"bbox_2d": [50', None),
    "a box breaks off before it": ('{"bbox_2d": [50 {"bbox_2d": [100, 200, 300, 400]}', None),
    "the same box twice": ('{"bbox_2d": [100, 200, 300, 400]} {"bbox_2d": [100, 200, 300, 400]}', None),
    "the same key twice": ('{"bbox_2d": [100, 200, 300, 400], "bbox_2d": [100, 200, 300, 400]}', None),
    "one box in another": ('{"bbox_2d": [100, 200, 300, 400], "part": {"bbox_2d": [100, 200, 300, 400]}}', None),
    "the box is an object": ('{"bbox_2d": {"bbox_2d": [100, 200, 300, 400]}}', None),
    "the box is named": ('{"bbox_2d": {"x1": 100, "y1": 200, "x2": 300, "y2": 400}}', None),
    "another key": ('{"bbox": [100, 200, 300, 400]}', None),
    "another case": ('{"BBOX_2D": [100, 200, 300, 400]}', None),
    "three dimensions": ('{"bbox_3d": [1, 2, 3, 4, 5, 6, 7, 8, 9]}', None),
    "no number as a confidence": ('{"bbox_2d": [100, 200, 300, 400], "confidence": NaN}', BOX),
    "no value for a label": ('{"bbox_2d": [100, 200, 300, 400], "label": null}', BOX),
    "a comma too many": ('{"bbox_2d": [100, 200, 300, 400],}', None),
    "no quotes around the key": ("{bbox_2d: [100, 200, 300, 400]}", None),
    "no braces": ('"bbox_2d": [100, 200, 300, 400]', None),
    "written in words": ("bbox_2d is [100, 200, 300, 400].", None),
    "named before": ('The "bbox_2d" is {"bbox_2d": [100, 200, 300, 400]}', BOX),
    "an escape that JSON lacks": ('{"bbox_2d": [100, 200, 300, 400], "label": "\\d"}', None),
    "a number in exponents": ('{"bbox_2d": [1e2, 200, 300, 400]}', None),
    "true for one": ('{"bbox_2d": [true, 200, 300, 400]}', None),
}


@pytest.mark.parametrize("text, box", SHAPES.values(), ids=SHAPES)
def test_a_box_is_the_one_in_a_json_object(text, box):
    assert boxes.parse_answer(text) == box
    start = boxes.answer_start(text)
    assert text[start] == "{" and boxes.parse_answer(text[start:]) == box if box else start == 0


def test_an_answer_begins_with_its_object_whatever_stands_around_it():
    said, around = '{"bbox_2d": [100, 200, 300, 400], "label": "{red}"}', '{"a": 1}'
    for before, after in product(("", "It is {red}: ", around), ("", " {", around)):
        assert boxes.answer_start(before + said + after) == len(before)


@given(valid_boxes(), st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none()), max_size=3), st.text())
def test_no_string_beside_a_box_changes_it(box, keys, label):
    values = {**keys, "bbox_2d": list(box), "label": label}
    for plain in (True, False):
        written = json.dumps(values, ensure_ascii=plain)
        assert boxes.parse_answer(written) == boxes.parse_answer(f"```json\n[\n\t{written}\n]\n```") == box
        assert boxes.parse_answer(json.dumps({"text": written})) is None
        assert boxes.parse_answer(written * 2) is None and boxes.parse_answer(written[:-1]) is None


LONG = {
    "braces": "{" * 100_000,
    "keys": '{"' * 50_000,
    "a deep object": '{"a":' * 100_000,
    "a deep answer": '{"a":' * 100_000 + '{"bbox_2d": [1, 2, 3, 4]}' + "}" * 100_000,
    "a deep list": '{"bbox_2d": ' + "[" * 100_000,
    "objects that never end": ('{"a":[' + "1," * 100) * 450,
    "a string that never ends": '{"bbox_2d": "' + "x" * 100_000,
    "answers": '{"bbox_2d": [1, 2, 3, 4]}' * 4_000,
    "a number": '{"bbox_2d": [1, 2, 3, ' + "9" * 100_000 + "]}",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_text_without_an_answer_is_soon_read(text):
    began = time.process_time()
    assert boxes.parse_answer(text) is None
    assert time.process_time() - began < 10  # a second at most here


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
