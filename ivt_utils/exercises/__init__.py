"""The exercises of the notebooks: the solution is the source, the cell with the gap and the check are made from it.

A check runs the learner's function and the solution on the same random inputs. A function that differs is compared
with known wrong ones: whichever it agrees with on every input names the mistake. One module a notebook.
"""

import ast
import contextlib
import copy
import importlib
import inspect
import io
import math
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import numpy as np
from PIL import Image

LESSONS = {
    "01_self_correction_gap": "gap",
    "02_error_harvesting": "harvesting",
    "03_sft_warmup": "warmup",
    "04_grpo": "rewards",
    "05_ablations": "comparisons",
    "06_mirage": "stopping",
}
TRIALS = 200
TOLERANCE = 1e-6
TODO, RIGHT, WRONG = "to do", "right", "not yet"
GAP = "return ...  # your code"


@dataclass(frozen=True)
class Exercise:
    """One exercise: its solution, and what a learner is told; its name is the solution's.

    `inputs(rng)` returns the arguments of one call, drawn from a `random.Random`; `mistakes` maps a sentence that names
    a mistake to a function that makes it; `imports` are the lines that the solution needs above it.
    """

    title: str
    minutes: int
    task: str
    hints: tuple[str, str, str]  # where to look, how it goes, nearly the code
    solution: FunctionType
    inputs: Callable[[random.Random], tuple]
    mistakes: dict[str, Callable]
    imports: str = ""

    @property
    def name(self) -> str:
        return self.solution.__name__


@dataclass(frozen=True)
class Verdict:
    """What a check found: TODO, RIGHT or WRONG, and one sentence about it."""

    state: str
    sentence: str


def lesson(notebook: str) -> tuple[Exercise, ...]:
    """Return the exercises of a notebook, such as "01_self_correction_gap", in reading order."""
    return importlib.import_module(f"{__name__}.{LESSONS[notebook]}").EXERCISES


def find(name: str) -> Exercise:
    """Return an exercise by the name of its solution; ValueError when there is none."""
    everything = {exercise.name: exercise for notebook in LESSONS for exercise in lesson(notebook)}
    if name not in everything:
        raise ValueError(f"There is no exercise {name!r}; choose one of {', '.join(everything)}.")
    return everything[name]


def exercise(name: str) -> Callable[[Callable], Callable]:
    """Return a decorator that checks the function below it, says what it found, and returns what the notebook goes on
    with: the learner's function when it is right, else the solution."""
    task = find(name)

    def decorate(function):
        verdict = check(task, function)
        goes_on = "your function" if verdict.state == RIGHT else "the solution"
        yours = f" Yours stays at hand as {name}.yours." if verdict.state == WRONG else ""
        print(f"[{verdict.state}] {name}: {verdict.sentence} The notebook goes on with {goes_on}.{yours}")
        vars(task.solution)["yours"] = function
        return function if verdict.state == RIGHT else task.solution

    return decorate


def check(task: Exercise, function: Callable, trials: int = TRIALS) -> Verdict:
    """Return what is to be said of a function that a learner wrote; the same function always gets the same verdict."""
    rng = random.Random(task.name)
    calls = [task.inputs(rng) for _ in range(trials)]
    outcomes = [outcome(function, call) for call in calls]
    if all(value is ... for value in outcomes):
        return Verdict(TODO, "not attempted yet.")
    expected = [outcome(task.solution, call) for call in calls]
    differing = [i for i in range(trials) if not same(outcomes[i], expected[i])]
    if not differing:
        return Verdict(RIGHT, f"it agrees with the solution on {trials} random inputs.")
    if all(value is None for value in outcomes):
        return Verdict(WRONG, "it returns None every time; is a `return` missing?")
    seen = [i for i in differing if told(outcomes[i]) != told(expected[i])] or differing  # a difference that shows
    i = min(seen, key=lambda i: len(signature(task.solution, calls[i])))  # the one that is read most easily
    example = f"For {signature(task.solution, calls[i])} it {told(outcomes[i])}, the solution {told(expected[i])}."
    shows = told(outcomes[i]) != told(expected[i])  # of two pictures only the size is told
    for sentence, mistaken in task.mistakes.items():
        if all(same(value, outcome(mistaken, call)) for value, call in zip(outcomes, calls, strict=True)):
            return Verdict(WRONG, f"{sentence} {example}" if shows else sentence)
    if not shows:
        example = "Look closely at places, sizes and rounding."
    return Verdict(WRONG, f"it differs from the solution on {len(differing)} of {trials} random inputs. {example}")


def outcome(function: Callable, call: tuple):
    """Return what a function gives for a copy of the arguments; for an exception, its type and text as an `Error`."""
    try:
        # What it prints or warns of would come once for every input.
        with np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
            return function(*copy.deepcopy(call))
    except Exception as error:
        return Error(type(error).__name__, str(error))


@dataclass(frozen=True)
class Error:
    """An exception that a function raised."""

    kind: str
    text: str


def same(a, b) -> bool:
    """Return whether two results agree: numbers within a millionth, lists, tuples and arrays by their items,
    dictionaries by key, pictures by pixel, exceptions by type."""
    a, b = (value.tolist() if hasattr(value, "tolist") else value for value in (a, b))  # also a tensor
    if isinstance(a, Error) or isinstance(b, Error):
        return isinstance(a, Error) and isinstance(b, Error) and a.kind == b.kind
    if isinstance(a, Image.Image) or isinstance(b, Image.Image):
        both = isinstance(a, Image.Image) and isinstance(b, Image.Image)
        return both and a.size == b.size and a.convert("RGB").tobytes() == b.convert("RGB").tobytes()
    if isinstance(a, dict) or isinstance(b, dict):
        both = isinstance(a, dict) and isinstance(b, dict)
        return both and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) or isinstance(b, list | tuple):
        both = isinstance(a, list | tuple) and isinstance(b, list | tuple)
        return both and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool | str) or isinstance(b, bool | str):
        return type(a) is type(b) and a == b
    try:
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (math.isnan(a) and math.isnan(b))
    except (TypeError, ValueError):
        return type(a) is type(b) and a == b


def signature(function: Callable, call: tuple) -> str:
    """Return the arguments of a call as a learner reads them: "a = (1, 2, 3, 4), b = (5, 6, 7, 8)"."""
    names = inspect.signature(function).parameters
    return ", ".join(f"{name} = {short(value)}" for name, value in zip(names, call, strict=False))


def told(value) -> str:
    """Return "gives VALUE", or "raises KIND: TEXT"."""
    if isinstance(value, Error):
        return f"raises {value.kind}: {value.text}" if value.text else f"raises {value.kind}"
    return f"gives {short(value)}"


def short(value, width: int = 100) -> str:
    """Return a value in at most `width` characters, its floats with three digits, a picture as its size."""
    if isinstance(value, Image.Image):
        return f"a picture of {value.width} x {value.height} pixels"
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        inner = ", ".join(short(item) for item in value)
        text = f"[{inner}]" if isinstance(value, list) else f"({inner})"
    else:
        text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]} ..."


# ------------------------------------------------------------------------------------------------ the cells
def task_text(task: Exercise, number: int) -> str:
    """Return the Markdown above an exercise's cell: what to do, about how long it takes, and three folded hints."""
    title = f"### Exercise {number}: {task.title} (about {task.minutes} minutes)"
    parts = [title, inspect.cleandoc(task.task)]
    parts += [folded(f"Hint {n}", inspect.cleandoc(hint)) for n, hint in enumerate(task.hints, 1)]
    return "\n\n".join(parts)


def stub_text(task: Exercise) -> str:
    """Return the source of an exercise's cell: the solution's head and docstring over a gap."""
    source = solution_text(task)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = function.body
    head = "\n".join(source.splitlines()[: body[0].end_lineno])  # up to the docstring's last line
    lines = [*task.imports.splitlines(), "from ivt_utils.exercises import exercise"]
    return "\n".join(lines) + f'\n\n\n@exercise("{task.name}")\n{head}\n    {GAP}'


def solution_text(task: Exercise) -> str:
    """Return the source of the solution."""
    return textwrap.dedent(inspect.getsource(task.solution)).strip()


def solution_markdown(task: Exercise) -> str:
    """Return the Markdown below an exercise's cell: its solution, folded away."""
    return folded("Solution", f"```python\n{solution_text(task)}\n```")


def folded(title: str, text: str) -> str:
    """Return Markdown that is folded away under a title."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
