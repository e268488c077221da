"""What a reader plays with: be the model, walk through trajectories, look into a GRPO group, set a stopping rule.

Each function displays its widget. Where nobody could use it (no notebook, or IVT_STATIC is set, as when the course is
executed by machine) it displays a figure with alt text and a sentence instead; the figure is saved as `path`. What a
state of the controls shows is in `views`.
"""

import base64
import io
import os
from html import escape
from pathlib import Path

from ivt_utils import loop, metrics, selection
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import load_image
from ivt_utils.schema import Rollout
from ivt_utils.show import views
from ivt_utils.show.box_canvas import canvas_class, data_url, panel
from ivt_utils.show.figures import save_figure

WIDGET = "application/vnd.jupyter.widget-view+json"


def be_the_model(student, records, profile, *, path: Path, box=None, number: int = 0) -> None:
    """Display a picture on which the reader answers with a box, and then what the student makes of that box.

    Static, it is record `number` with the rollout from `box` (0..1000), or from the student's own first answer.
    """
    record = records[number]
    if live():
        question = views.question_view(load_image(record["image"]), record["expression"])
        present(question, path, _model_panel(student, records, profile, number))
        return
    if box is None:
        rollout, first = loop.evaluate(student, [record], profile)[0], "the student's own answer"
    else:
        rollout, first = loop.answers_from(student, record, box, profile), "the given box"
    view = views.model_view(load_image(record["image"]), rollout, first, profile.style)
    present(
        view,
        path,
        does="answer with a box of your own, drawn by mouse, finger or keyboard, and see what the student makes of it",
    )


def trajectory_explorer(records, methods: dict[str, list[dict]], *, path: Path, kind: str = "most improved") -> None:
    """Display the steps of the rollouts of several methods: choose a method, a filter, a sample and a step.

    `methods`: {name: rollouts of some of the records}. `kind`: the filter of `views.FILTERS` to begin with.
    """
    if not methods or not all(methods.values()):
        raise ValueError("The explorer needs at least one method, and a rollout of each.")
    first = next(iter(methods))
    kind = kind if views.ordered(methods[first], kind) else "all"
    last = len(methods[first][0]["steps"]) - 1
    view = views.trajectory_view(records, methods, first, kind, 1, last)
    present(
        view,
        path,
        _trajectory_panel(records, methods, kind, last) if live() else None,
        does="choose the method, the sample (the worst, the most improved, the most degraded) and the step",
    )


def group_viewer(records, groups: list[list[dict]], format_bonus: float, *, path: Path, spread: str = "batch") -> None:
    """Display groups of rollouts of one prompt each, with rewards and advantages as GRPO takes them.

    `groups`: rollouts of `loop.evaluate` with a temperature. `spread`: what advantages are divided by, to begin with.
    """
    if not groups or not all(groups):
        raise ValueError("The viewer needs at least one group, and a rollout in each.")
    view = views.group_view(records, groups, format_bonus, 1, spread)
    present(
        view,
        path,
        _group_panel(records, groups, format_bonus, spread) if live() else None,
        does="look at each group, and divide the advantages by the spread of the batch, of the group or not at all",
    )


def stop_rule_slider(rollouts, thresholds, resampling: Resampling, *, path: Path, split: str = "validation") -> None:
    """Display what a stopping rule gives at each threshold, on rollouts with confidence (`confidence`).

    `split` names the samples. They should be those of validation, where thresholds are chosen.
    """
    if not rollouts or not all("fits" in step for rollout in rollouts for step in rollout["steps"]):
        raise ValueError("A stopping rule needs rollouts with confidence; `confidence.with_confidence` makes them.")
    curves = {name: selection.rule_curve(rollouts, stop, thresholds) for name, stop in selection.STOPS.items()}
    note = (
        f"These are {len(rollouts)} {split} samples. Thresholds are chosen on validation samples, "
        "and the test samples are scored once."
    )
    first, curve = next(iter(curves.items()))
    start = max(curve, key=lambda point: point["acc50"])["threshold"]
    view = views.rule_view(rollouts, first, curve, start, resampling, split)
    present(
        view,
        path,
        _rule_panel(rollouts, curves, start, note, resampling, split) if live() else None,
        note=note,
        does="choose the rule and move its threshold",
    )


# ------------------------------------------------------------------------------------------------ display
def live() -> bool:
    """Return whether widgets can be used: in the kernel of a notebook, unless IVT_STATIC is set."""
    from IPython import get_ipython

    return not os.environ.get("IVT_STATIC") and getattr(get_ipython(), "kernel", None) is not None


def present(view, path: Path, controls=None, *, does: str = "", note: str = "") -> None:
    """Save and display a view; with controls, those, and the figure where widgets cannot be shown."""
    from IPython.display import Markdown, display

    from ivt_utils.show.figures import show

    figure, alt, caption = view
    if controls is None:
        show(figure, path, alt)
        does = f"In JupyterLab or Colab, with a running kernel, you can {does}."
        display(Markdown("\n\n".join(filter(None, (caption, note, does)))))
        return
    figure.set_label(alt)
    save_figure(figure, path)
    data = {  # as ipywidgets 8 does it; Colab has 7, which keeps this to itself
        WIDGET: {"version_major": 2, "version_minor": 0, "model_id": controls.model_id},
        "text/plain": alt,
        "image/png": base64.b64encode(path.read_bytes()).decode(),
    }
    display(data, metadata={"image/png": {"alt": alt, "width": 700}}, raw=True)


def picture_html(view, width: str = "700px") -> str:
    """Return a view as HTML: the picture with its alt text, as wide as there is room, and the caption below."""
    figure, alt, caption = view
    below = f'<figcaption style="line-height:1.4;margin-top:4px">{escape(caption)}</figcaption>' if caption else ""
    if figure is None:
        return f"<figure style='margin:0'>{below}</figure>"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    style = f"width:100%;max-width:{width};height:auto;background:white"
    image = f'<img src="{data_url(buffer.getvalue())}" alt="{escape(alt)}" style="{style}">'
    return f'<figure style="margin:0">{image}{below}</figure>'


def _panel(controls, show, note: str = ""):
    """Return a box of controls above the picture of `show(*values)`, drawn anew when a control changes."""
    import ipywidgets

    picture = ipywidgets.HTML(layout={"width": "100%"})

    def draw(_=None):
        picture.value = picture_html(show(*(control.value for control in controls)))

    for control in controls:
        control.observe(draw, "value")
    draw()
    row = ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", "width": "100%"})
    words = [ipywidgets.HTML(f'<p style="line-height:1.4;margin:0">{escape(note)}</p>')] if note else []
    return panel([*words, row, picture])


def _slider(description: str, low: int, high: int, value: int):
    import ipywidgets

    return ipywidgets.IntSlider(value, low, max(low, high), description=description, continuous_update=False)


def _trajectory_panel(records, methods, kind: str, last: int):
    import ipywidgets

    method = ipywidgets.Dropdown(options=list(methods), description="Method")
    filtered = ipywidgets.Dropdown(
        options=[(k if k == "all" else f"{k} ({views.WITH_TRUTH})", k) for k in views.FILTERS],
        value=kind,
        description="Filter",
        layout={"width": "min(100%, 420px)"},
    )
    sample, step = _slider("Sample", 1, 1, 1), _slider("Step", 0, last, last)

    def bounds(_=None):
        rollouts = methods[method.value]
        sample.max = max(1, len(views.ordered(rollouts, filtered.value)))
        step.max = len(rollouts[0]["steps"]) - 1

    method.observe(bounds, "value")
    filtered.observe(bounds, "value")
    filtered.observe(lambda _: setattr(sample, "value", 1), "value")
    bounds()
    return _panel([method, filtered, sample, step], lambda *state: views.trajectory_view(records, methods, *state))


def _group_panel(records, groups, format_bonus: float, spread: str):
    import ipywidgets

    divide = ipywidgets.Dropdown(
        options=[("of the batch", "batch"), ("of its group", "group"), ("not divided", "none")],
        value=spread,
        description="Spread",
    )
    return _panel(
        [_slider("Group", 1, len(groups), 1), divide],
        lambda *state: views.group_view(records, groups, format_bonus, *state),
    )


def _rule_panel(rollouts, curves: dict, start: float, note: str, resampling: Resampling, split: str):
    import ipywidgets

    rule = ipywidgets.Dropdown(options=list(curves), description="Rule")
    steps = [point["threshold"] for point in next(iter(curves.values()))]
    threshold = ipywidgets.SelectionSlider(options=steps, value=start, description="Threshold", continuous_update=False)

    def view(name, at):
        return views.rule_view(rollouts, name, curves[name], at, resampling, split)

    return _panel([rule, threshold], view, note)


def _model_panel(student, records, profile, number: int):
    """Return the canvas with its controls; a submitted box is answered by the student below it."""
    import ipywidgets

    picture = _slider("Picture", 1, len(records), number + 1)
    following = ipywidgets.Button(description="Next picture")
    question, answers = ipywidgets.HTML(), ipywidgets.HTML(layout={"width": "100%"})
    canvas = canvas_class()(grid=student.grid, layout={"width": "100%", "max_width": "400px"})

    def ask(_=None):
        record = records[picture.value - 1]
        words = escape(record["expression"])
        question.value = f'<p style="margin:0;line-height:1.4">Draw a box around <b>{words}</b>.</p>'
        answers.value = canvas.status = ""
        canvas.truth, canvas.box, canvas.label = [], [], record["expression"]
        canvas.image = data_url(load_image(record["image"]))

    def answer(_):
        record, box = records[picture.value - 1], list(canvas.box)
        try:
            rollout = loop.answers_from(student, record, box, profile)
            value = metrics.iou_matrix([rollout])[0, 0]
            canvas.box, canvas.truth = list(rollout["steps"][0]["box"] or box), [round(v) for v in record["bbox"]]
            answers.value = _strip_html(load_image(record["image"]), rollout, profile.style)
            theirs = "; ".join(views.step_texts(rollout, "your box")[1:])
            canvas.status = (
                f"Your box: {', '.join(map(str, canvas.box))}. IoU {value:.2f} with the truth (dashed). "
                f"The student: {theirs}."
            )
        except Exception as error:
            canvas.status = f"The student could not answer: {error}"
        finally:
            canvas.busy = False

    picture.observe(ask, "value")
    following.on_click(lambda _: setattr(picture, "value", picture.value % len(records) + 1))
    canvas.observe(answer, "submits")
    ask()
    row = ipywidgets.HBox([picture, following], layout={"flex_flow": "row wrap", "width": "100%"})
    return panel([row, question, canvas, answers])


def _strip_html(image, rollout: Rollout, style: str) -> str:
    """Return the steps of a rollout side by side, below each other on a phone: picture, IoU and the answer's text."""
    cells = []
    for number, (step, line) in enumerate(zip(rollout["steps"], views.step_texts(rollout, "your box"), strict=True)):
        picture = picture_html(views.step_view(image, rollout, number, style), "210px")
        words = "" if number == 0 else f"<br>“{escape(step['text'])}”"
        cells.append(f'<div style="flex:1 1 170px;max-width:220px;line-height:1.4">{picture}<b>{line}</b>{words}</div>')
    lead = "Red: each answer as it is drawn for the student, yours first; dashed: the truth."
    return (
        f'<p style="line-height:1.4;margin:8px 0">{lead}</p>'
        f'<div class="ivt-strip" style="display:flex;flex-wrap:wrap;gap:12px">{"".join(cells)}</div>'
    )
