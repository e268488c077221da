"""Exercises: each check accepts the solution and every right variant, knows the stub, and names the known mistakes."""

import ast
import inspect
import random
import re
import time
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ivt_utils import boxes, exercises, harvest, metrics, overlay, teacher
from ivt_utils.exercises import LESSONS, RIGHT, TODO, WRONG, check, find, lesson, same
from ivt_utils.exercises.gap import my_from_pixels, my_iou, my_overlays
from ivt_utils.exercises.harvesting import my_straight_line, my_trace
from ivt_utils.exercises.warmup import my_has_problem, my_labels, my_lora, my_oracle
from ivt_utils.paper_scale.trace_check import ways
from ivt_utils.protocol import PROBLEMS, TRACE_FITS

EVERY = [found for notebook in LESSONS for found in lesson(notebook)]
each = pytest.mark.parametrize("found", EVERY, ids=lambda found: found.name)


# ------------------------------------------------------------------------------------------------ every exercise
@pytest.mark.parametrize("notebook", LESSONS)
def test_a_notebook_has_an_exercise(notebook):
    assert lesson(notebook)


def test_names_are_unique_and_lead_to_the_exercise():
    assert len({found.name for found in EVERY}) == len(EVERY)
    assert all(find(found.name) is found and found.name.startswith("my_") for found in EVERY)
    with pytest.raises(ValueError, match="choose one of my_iou"):
        find("my_nothing")


@each
def test_the_words_of_an_exercise_are_complete(found):
    assert found.title and inspect.cleandoc(found.task) and 1 <= found.minutes <= 15
    assert len(found.hints) == 3 and all(hint.strip() for hint in found.hints)
    code = [sum(map(len, re.findall(r"`([^`]+)`", hint))) for hint in found.hints]
    assert code[2] > code[0], "the last hint is nearly the code"
    assert len(found.mistakes) >= 3
    assert all(sentence.endswith(".") and "you" in sentence.lower() for sentence in found.mistakes)
    assert inspect.getdoc(found.solution).startswith("Return ")


@each
def test_the_text_above_the_cell_folds_three_hints_and_no_line_turns_into_code(found):
    text = exercises.task_text(found, 2)
    assert text.startswith(f"### Exercise 2: {found.title} (about {found.minutes} minutes)\n\n")
    assert text.count("<summary>Hint ") == text.count("</details>") == 3
    assert not [line for line in text.splitlines() if line.startswith("    ")]


@each
def test_the_solution_is_right_also_alone_with_its_imports(found):
    assert check(found, found.solution).state == RIGHT
    cell = {}
    exec(f"{found.imports}\n\n\n{exercises.solution_text(found)}", cell)
    assert check(found, cell[found.name]).state == RIGHT
    assert exercises.solution_text(found) in exercises.solution_markdown(found)


@each
def test_the_stub_is_to_do_and_the_notebook_goes_on_with_the_solution(found, capsys):
    stub, cell = exercises.stub_text(found), {}
    exec(stub, cell)
    assert capsys.readouterr().out.startswith(f"[{TODO}] {found.name}: not attempted yet.")
    assert cell[found.name] is found.solution
    head = ast.parse(stub).body[-1]
    assert ast.get_docstring(head) == inspect.getdoc(found.solution)
    assert [a.arg for a in head.args.args] == list(inspect.signature(found.solution).parameters)
    assert stub.endswith(f"\n    {exercises.GAP}") and exercises.GAP not in exercises.solution_text(found)


@each
def test_a_right_answer_is_kept_and_a_wrong_one_replaced(found, capsys):
    def mine(*call):
        return found.solution(*call)

    assert exercises.exercise(found.name)(mine) is mine
    assert capsys.readouterr().out.startswith(f"[{RIGHT}] {found.name}: ")
    assert exercises.exercise(found.name)(next(iter(found.mistakes.values()))) is found.solution
    assert capsys.readouterr().out.startswith(f"[{WRONG}] {found.name}: {next(iter(found.mistakes))}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("found", "sentence"),
    [pytest.param(found, s, id=f"{found.name}-{n}") for found in EVERY for n, s in enumerate(found.mistakes, 1)],
)
def test_a_planted_mistake_is_named_and_no_other(found, sentence):
    verdict = check(found, found.mistakes[sentence])
    assert verdict.state == WRONG and verdict.sentence.startswith(sentence)
    assert not [other for other in found.mistakes if other != sentence and other in verdict.sentence]


@each
def test_a_function_that_raises_is_told_so(found):
    def broken(*call):
        raise LookupError("lost in a list")

    verdict = check(found, broken)
    assert verdict.state == WRONG and "raises LookupError: lost in a list" in verdict.sentence


@each
def test_a_function_with_other_parameters_is_told_so(found):
    verdict = check(found, lambda: 1)
    assert verdict.state == WRONG and "raises TypeError" in verdict.sentence and "argument" in verdict.sentence


@each
def test_a_forgotten_return_is_told(found):
    verdict = check(found, lambda *call: None)
    assert verdict.state == WRONG and "`return` missing" in verdict.sentence


@pytest.mark.slow
@each
def test_a_verdict_is_the_same_every_time(found):
    for function in (found.solution, *found.mistakes.values()):
        verdict = check(found, function)
        random.seed(1)
        np.random.seed(1)
        assert check(found, function) == verdict


@pytest.mark.slow
@each
def test_a_check_takes_less_than_two_seconds(found):
    for function in (found.solution, lambda *call: "something else"):
        started = time.process_time()
        check(found, function)
        assert time.process_time() - started < 2


@each
def test_a_solution_leaves_its_arguments_alone(found):
    rng = random.Random(5)
    for _ in range(20):
        state = rng.getstate()
        call = found.inputs(rng)
        found.solution(*call)
        rng.setstate(state)
        assert same(list(call), list(found.inputs(rng)))


@pytest.mark.slow
@each
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-5, 1), share=st.floats(0.1, 1))
def test_a_small_error_on_some_inputs_is_never_right(found, seed, size, share):
    rng = random.Random(seed)

    def nearly(*call):
        result = found.solution(*call)
        return off(result, size, rng) if rng.random() < share else result

    assert check(found, nearly).state == WRONG


def off(value, size: float, rng):
    """Return a result that differs in one place, a number by `size` of itself."""
    if isinstance(value, Image.Image):
        value, place = value.copy(), (rng.randrange(value.width), rng.randrange(value.height))
        value.putpixel(place, tuple((v + 1) % 256 for v in value.getpixel(place)))
        return value
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple) and value:
        i = rng.randrange(len(value))
        return [*value[:i], off(value[i], size, rng), *value[i + 1 :]]
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: off(value[key], size, rng)}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + size * max(1, abs(value))
    return f"{value} or so"


# ------------------------------------------------------------------------------------------------ right variants
def iou_by_torchvision(a, b):
    import torch
    from torchvision.ops import box_iou

    return box_iou(*(torch.tensor([box], dtype=torch.float64) for box in (a, b))).item()


def iou_by_numpy(a, b):
    a, b = np.array(a, float).reshape(2, 2), np.array(b, float).reshape(2, 2)
    shared = np.prod(np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None))
    return shared / (np.prod(a[1] - a[0]) + np.prod(b[1] - b[0]) - shared)


def iou_with_early_return(a, b):
    if a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]:
        return 0
    shared = (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def from_pixels_by_decimal(box, width, height):
    exact = [Decimal(v) * 1000 / size for v, size in zip(box, (width, height) * 2, strict=True)]
    whole = [int(v.quantize(Decimal(1), ROUND_HALF_UP)) for v in exact]
    return tuple(sorted((0, v, 1000))[1] for v in whole)


def overlays_by_numpy(image, boxes):
    pictures = []
    for box in boxes:
        pixels = np.array(image)
        scale = np.array([*image.size, *image.size]) / 1000
        x1, y1, x2, y2 = np.rint(np.array(box) * scale).astype(int)
        pixels[[y1, y2], x1 : x2 + 1] = pixels[y1 : y2 + 1, [x1, x2]] = 255, 0, 0
        pictures.append(Image.fromarray(pixels))
    return pictures


def overlays_by_lines(image, boxes):
    def one(box):
        new = Image.new("RGB", image.size)
        new.paste(image)
        w, h = new.size
        x1, y1, x2, y2 = (int(v / 1000 * s + 0.5) for v, s in zip(box, (w, h, w, h), strict=True))
        ImageDraw.Draw(new).line([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)], fill=(255, 0, 0))
        return new

    return tuple(map(one, boxes))


def line_step_by_step(start, truth, turns):
    here, found = np.array(start, float), []
    for left in range(turns, 0, -1):
        here = here + (np.array(truth) - here) / left
        found.append(here)
    return found


def trace_by_ranking(box, truth):
    errors = {
        ("too far left", "too far right"): ((truth[0] + truth[2]) / 2 - (box[0] + box[2]) / 2) / (truth[2] - truth[0]),
        ("too high", "too low"): ((truth[1] + truth[3]) / 2 - (box[1] + box[3]) / 2) / (truth[3] - truth[1]),
    }
    names, error = max(errors.items(), key=lambda item: abs(item[1]))
    word = names[error < 0]
    return f"It is {word}: {PROBLEMS[word]}." if abs(error) > 0.1 else TRACE_FITS


def trace_without_division(box, truth):
    width, height = truth[2] - truth[0], truth[3] - truth[1]
    dx, dy = (box[0] + box[2] - truth[0] - truth[2]) / 2, (box[1] + box[3] - truth[1] - truth[3]) / 2
    if abs(dx) <= 0.1 * width and abs(dy) <= 0.1 * height:
        return "It fits: keep it."
    if abs(dx) * height > abs(dy) * width:
        return "It is too far right: move left." if dx > 0 else "It is too far left: move right."
    return "It is too low: move up." if dy > 0 else "It is too high: move down."


def labels_by_torch(ids, assistant):
    import torch

    return torch.tensor(ids).masked_fill(~torch.tensor(assistant).bool(), -100)


def lora_by_torch(x, W, A, B, alpha, rank):
    from torch import as_tensor
    from torch.nn.functional import linear

    x, W, A, B = map(as_tensor, (x, W, A, B))
    return linear(x, W) + linear(linear(x, A), B) * (alpha / rank)


def has_problem_by_cases(problem, box, other):
    if problem in ("too far left", "too far right"):
        error = (box[0] + box[2]) / 2 - (other[0] + other[2]) / 2
    elif problem in ("too high", "too low"):
        error = (box[1] + box[3]) / 2 - (other[1] + other[3]) / 2
    elif problem in ("too narrow", "too wide"):
        error = (box[2] - box[0]) - (other[2] - other[0])
    else:
        error = (box[3] - box[1]) - (other[3] - other[1])
    return error < 0 if problem in ("too far left", "too high", "too narrow", "too short") else error > 0


def oracle_in_plain_python(ious, threshold):
    final = [1 if row[-1] >= threshold else 0 for row in ious]
    best = [any(iou >= threshold for iou in row) for row in ious]
    return [sum(final) / len(final), sum(best) / len(best)]


VARIANTS = {
    "my_iou": {
        "torchvision": iou_by_torchvision,
        "numpy": iou_by_numpy,
        "early return": iou_with_early_return,
        "floats": lambda a, b: my_iou([float(v) for v in a], np.array(b)),
    },
    "my_from_pixels": {
        "decimal": from_pixels_by_decimal,
        "clip, then cut": lambda box, w, h: [
            int(min(1000, max(0, v / s * 1000)) + 0.5) for v, s in zip(box, (w, h, w, h), strict=True)
        ],
        "numpy, as floats": lambda box, w, h: np.clip(np.floor(np.array(box) * 1000 / [w, h, w, h] + 0.5), 0, 1000),
        "clip in pixels": lambda box, w, h: [
            int(np.floor(min(s, max(0, v)) / s * 1000 + 0.5)) for v, s in zip(box, (w, h, w, h), strict=True)
        ],
    },
    "my_overlays": {"numpy": overlays_by_numpy, "lines": overlays_by_lines},
    "my_straight_line": {
        "linspace": lambda start, truth, turns: np.linspace(start, truth, turns + 1)[1:],
        "step by step": line_step_by_step,
        "weights": lambda start, truth, turns: [
            tuple((1 - k / turns) * a + k / turns * b for a, b in zip(start, truth, strict=True))
            for k in range(1, turns + 1)
        ],
    },
    "my_trace": {"ranking": trace_by_ranking, "without division": trace_without_division},
    "my_labels": {
        "numpy": lambda ids, mask: np.where(np.array(mask) == 1, ids, -100),
        "torch": labels_by_torch,
        "a tuple": lambda ids, mask: tuple(ids[i] if mask[i] else -100 for i in range(len(ids))),
    },
    "my_lora": {
        "torch": lora_by_torch,
        "merged": lambda x, W, A, B, alpha, rank: x @ (W + alpha / rank * B @ A).T,
        "einsum": lambda x, W, A, B, alpha, rank: (
            np.einsum("ni,oi->no", x, W) + np.einsum("ni,ri,or->no", x, A, B) * alpha / rank
        ),
        "a list": lambda x, W, A, B, alpha, rank: [list(W @ v + B @ (A @ v) * alpha / rank) for v in x],
    },
    "my_has_problem": {
        "the package's": lambda problem, box, other: problem in ways(box, other),
        "by cases": has_problem_by_cases,
    },
    "my_oracle": {
        "plain Python": oracle_in_plain_python,
        "right at any step": lambda ious, limit: np.array(
            [np.mean(ious[:, -1] >= limit), np.mean((ious >= limit).any(axis=1))]
        ),
        "sorted rows": lambda ious, limit: tuple(
            np.count_nonzero(m[:, -1] >= limit) / len(m) for m in (ious, np.sort(ious, axis=1))
        ),
    },
}


@pytest.mark.parametrize(
    ("name", "function"),
    [pytest.param(name, f, id=f"{name}-{how}") for name, variants in VARIANTS.items() for how, f in variants.items()],
)
def test_a_right_variant_is_right(name, function):
    verdict = check(find(name), function, trials=1000)
    assert verdict.state == RIGHT, verdict.sentence


def test_results_agree_by_value_and_not_by_chance():
    import torch

    gray, lighter = Image.new("RGB", (9, 9), (50, 50, 50)), Image.new("RGB", (9, 9), (50, 50, 50))
    lighter.putpixel((4, 4), (51, 50, 50))
    assert same((1, [2.0]), [np.float32(1), np.array([2])]) and same(torch.tensor([1.0, 2.0]), [1, 2])
    assert same(gray, gray.copy()) and not same(gray, lighter) and not same(gray, lighter.crop((0, 0, 5, 5)))
    for a, b in (("1", 1), (True, 1), (None, 0), ([], 0), ([1], [1, 1]), (1.0, 1.00001), ({"a": 1}, {"b": 1})):
        assert not same(a, b) and not same(b, a)


# ------------------------------------------------------------------------------------------------ the course's own
@st.composite
def a_box(draw, most=1000):
    x1, x2 = sorted(draw(st.lists(st.integers(0, most), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, most), min_size=2, max_size=2, unique=True)))
    return x1, y1, x2, y2


SIZE = st.integers(8, 3000)
IOUS = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=9).map(np.array)


@given(a_box(), a_box())
def test_my_iou_is_the_courses(a, b):
    assert my_iou(a, b) == pytest.approx(boxes.iou(a, b))


@given(a_box(), SIZE, SIZE)
def test_a_box_in_pixels_comes_back_from_my_function(box, width, height):
    assert tuple(my_from_pixels(boxes.to_pixels(box, width, height), width, height)) == box


@given(st.integers(-500, 500), st.integers(-500, 500), st.integers(600, 3500), st.integers(600, 3500), SIZE, SIZE)
def test_my_thousandths_are_the_courses_where_a_box_remains(x1, y1, x2, y2, width, height):
    box = x1, y1, x2, y2
    mine = my_from_pixels(box, width, height)
    unclear = any(abs(v * 1000 / s % 1 - 0.5) < 1e-6 for v, s in zip(box, (width, height) * 2, strict=True))
    if mine[0] < mine[2] and mine[1] < mine[3] and not unclear:
        assert tuple(mine) == boxes.from_pixels(box, width, height)


@given(a_box(most=9))
def test_my_overlay_is_the_courses_outline_one_pixel_larger(box):
    image = Image.new("RGB", (100, 100), "white")
    x1, y1, x2, y2 = (100 * v for v in box)
    [mine] = my_overlays(image, [(x1, y1, x2 - 10, y2 - 10)])
    assert same(mine, overlay.draw_box(image, (x1, y1, x2, y2), "outline"))


@given(a_box(), a_box(), st.integers(1, 6))
def test_my_line_is_the_courses_before_rounding(start, truth, turns):
    mine = my_straight_line(start, truth, turns)
    assert mine[-1] == pytest.approx(truth)
    for box, rounded in zip(mine, harvest.straight_line(start, truth, turns), strict=True):
        unclear = any(abs(v % 1 - 0.5) < 1e-6 for v in box)
        assert unclear or boxes.snap(box) == rounded


@given(a_box(), st.integers(-300, 300), st.integers(-300, 300))
def test_my_trace_says_the_teachers_worst_problem_of_a_box_of_the_right_size(truth, dx, dy):
    assume(abs(dx) * (truth[3] - truth[1]) != abs(dy) * (truth[2] - truth[0]))
    box = truth[0] + dx, truth[1] + dy, truth[2] + dx, truth[3] + dy
    fits, worst = teacher.within_tolerance(box, truth), teacher.problems(box, truth, most=1)
    assert my_trace(box, truth) == (TRACE_FITS if fits else f"It is {worst[0]}: {PROBLEMS[worst[0]]}.")


@given(IOUS, st.sampled_from(["acc50", "acc70", "acc90"]))
def test_my_accuracies_are_the_courses_and_the_oracle_is_never_below(ious, metric):
    final, oracle = my_oracle(ious, metrics.THRESHOLDS[metric])
    assert final == metrics.step_score("final", metric)(ious).mean() <= oracle
    assert oracle == metrics.step_score("oracle", metric)(ious).mean()


@given(a_box(), a_box())
def test_my_problems_are_those_that_the_package_sees_and_the_teachers_are_among_them(box, other):
    mine = {problem for problem in PROBLEMS if my_has_problem(problem, box, other)}
    assert mine == ways(box, other) and mine >= set(teacher.problems(box, other, most=len(PROBLEMS)))


def test_my_labels_give_the_mean_loss_of_the_graded_tokens():
    import torch
    from torch.nn.functional import cross_entropy

    ids, assistant = [3, 0, 2, 1, 4], [0, 1, 0, 1, 1]
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    own = [cross_entropy(logits[i], torch.tensor(ids[i])) for i in (1, 3, 4)]
    assert cross_entropy(logits, torch.tensor(my_labels(ids, assistant))) == pytest.approx(sum(own) / 3)


def test_my_lora_layer_is_pefts():
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False))
    x, W = torch.randn(4, 5), model[0].weight.detach()
    layer = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), model)[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for fresh in (True, False):  # PEFT starts from B = 0
        if not fresh:
            torch.nn.init.normal_(B)
        mine = my_lora(*(v.detach().numpy() for v in (x, W, A, B)), alpha=6, rank=2)
        assert np.allclose(mine, model(x).detach().numpy(), atol=1e-5)
        assert np.allclose(mine, x @ W.T, atol=1e-5) == fresh
