"""The widgets without a browser: what their controls show, their figure and sentence, and what they rest on."""

import re
from html import unescape
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython import display as ipython

from ivt_utils import grpo, metrics, protocol, selection
from ivt_utils.metrics import Resampling
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import read_jsonl
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.show import views, widgets

THRESHOLDS = get_profile("smoke").thresholds

BOX = (100, 100, 300, 300)


def rollout(name: str, *boxes, truth=BOX) -> dict:
    steps = [{"text": protocol.answer_text(box) if box else "no box", "box": box} for box in boxes]
    return {"id": name, "image_id": name, "subset": "s", "expression": "the star", "truth": list(truth), "steps": steps}


GOOD, FAIR, BAD = BOX, (100, 100, 300, 400), (700, 700, 900, 900)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, instead of displaying it: (arguments, options) of each call."""
    calls = []
    monkeypatch.setattr(ipython, "display", lambda *things, **options: calls.append((things, options)))
    return calls


@pytest.fixture
def alive(monkeypatch):
    monkeypatch.setattr(widgets, "live", lambda: True)


@pytest.fixture
def methods(records):
    answers = [(FAIR, GOOD), (GOOD, BAD), (GOOD, None), (BAD, BAD), (BAD, FAIR)]
    first = [rollout(record["id"], *boxes) for record, boxes in zip(records, answers, strict=False)]
    return {"one": first, "other": [rollout(first[0]["id"], BAD, GOOD, GOOD)]}


@pytest.fixture(scope="module")
def confident():
    return read_jsonl(REFERENCE / "rollouts" / "confidence_sft_ivt_val.jsonl")[:60]


def control(box, description: str):
    found = [box] if getattr(box, "description", "") == description else []
    for child in getattr(box, "children", ()):
        found += [it for it in [control(child, description)] if it is not None]
    return found[0] if found else None


def alt(box) -> str:
    """The alt text of the first picture in a panel."""
    return unescape(re.search(r'<img [^>]*alt="([^"]*)"', all_html(box))[1])


def all_html(box) -> str:
    own = box.value if type(box).__name__ == "HTML" else ""
    return own + "".join(all_html(child) for child in getattr(box, "children", ()))


# ------------------------------------------------------------------------------------------------ what they rest on
def test_filters_order_by_what_their_names_say(methods):
    rollouts = methods["one"]  # gains: +.33, -1, -1, 0, +.67
    assert views.ordered(rollouts, "all") == [0, 1, 2, 3, 4]
    assert views.ordered(rollouts, "most improved") == [4, 0]
    assert views.ordered(rollouts, "most degraded") == [1, 2]
    assert views.ordered(rollouts, "worst at the end") == [1, 2, 3, 4, 0]
    with pytest.raises(ValueError, match="no filter 'best'; choose one of all"):
        views.ordered(rollouts, "best")


def test_all_needs_no_truth_and_the_other_filters_say_that_they_do(records, methods):
    for kind in views.FILTERS:
        _, text, caption = views.trajectory_view(records, methods, "one", kind, 1, 0)
        assert (views.WITH_TRUTH in text) == (views.WITH_TRUTH in caption) == (kind != "all")


def test_a_reward_is_the_final_iou_and_a_bonus_for_answers_that_all_parse():
    group = [rollout("a", BAD, GOOD), rollout("a", None, GOOD), rollout("a", GOOD, None), rollout("a", GOOD, FAIR)]
    assert grpo.group_rewards(group, 0.1) == pytest.approx([1.1, 1.0, 0.0, 2 / 3 + 0.1])


@pytest.mark.parametrize("spread", grpo.SPREADS)
def test_advantages_are_those_of_trl(spread):
    import torch
    from trl.trainer.utils import nanstd

    rewards = [[0.9, 0.1, 0.5], [1.0, 0.8, 0.9], [0.4, 0.4, 0.4]]
    given = torch.tensor(rewards)
    expected = given - given.mean(1, keepdim=True)
    if spread != "none":
        by = nanstd(given.view(-1)) if spread == "batch" else nanstd(given, dim=1)[:, None]
        expected = expected / (by + 1e-4)
    assert np.allclose(grpo.advantages(rewards, spread), expected, atol=1e-5)
    assert grpo.advantages(rewards, spread)[2] == [0.0] * 3  # equal rewards teach nothing


def test_an_unknown_spread_is_one_sentence_and_one_rollout_has_no_spread():
    with pytest.raises(ValueError, match="no spread 'sum'; choose one of batch, group, none"):
        grpo.advantages([[1.0]], "sum")
    assert grpo.advantages([[1.0]], "batch") == grpo.advantages([[1.0]], "group") == [[0.0]]


@pytest.mark.parametrize("stop", selection.STOPS.values())
def test_a_curve_gives_what_choosing_by_the_rule_gives(confident, stop):
    for point in selection.rule_curve(confident, stop, (0.1, 0.5, 0.9)):
        chosen = selection.choose(confident, stop(point["threshold"]))
        assert point["acc50"] == (metrics.iou_matrix(chosen)[:, 0] >= 0.5).mean()
        own = [stop(point["threshold"])(r["steps"]) for r in confident]
        assert point["answers"] == [own.count(step) for step in range(3)] and sum(point["answers"]) == len(confident)


# ------------------------------------------------------------------------------------------------ static
def displays(records, methods, confident, folder) -> list:
    group = [rollout(records[0]["id"], BAD, box) for box in (GOOD, FAIR, None, BAD, GOOD, GOOD)]
    return [
        lambda: widgets.trajectory_explorer(records, methods, path=folder / "a.png"),
        lambda: widgets.group_viewer(records, [group, group[:4]], 0.1, path=folder / "b.png"),
        lambda: widgets.stop_rule_slider(confident, THRESHOLDS, Resampling(0, 50), path=folder / "c.png"),
    ]


def test_without_a_notebook_each_is_one_picture_with_alt_text_and_a_sentence(
    records, methods, confident, scripted, shown, tmp_path
):
    student = scripted(lambda turn, i: protocol.answer_text(BOX))
    asked = [
        *displays(records, methods, confident, tmp_path),
        lambda: widgets.be_the_model(student, records, get_profile("micro"), path=tmp_path / "d.png"),
    ]
    for show in asked:
        shown.clear()
        show()
        ((picture,), _), ((words,), _) = shown
        assert type(picture).__name__ == "Image" and len(picture.metadata["alt"]) > 40
        assert re.search(r"In JupyterLab or Colab, with a running kernel, you can [^.]+\.$", words.data)
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_thresholds_sentence_says_where_it_is_chosen(confident, shown, tmp_path):
    widgets.stop_rule_slider(confident, THRESHOLDS, Resampling(0, 50), path=tmp_path / "c.png")
    words = shown[1][0][0].data
    assert "These are 60 validation samples. Thresholds are chosen on validation samples" in words


def test_the_static_model_shows_the_given_box_or_the_students_own(scripted, records, shown, tmp_path):
    profile, path = get_profile("micro"), tmp_path / "d.png"
    for box, first in ((None, "step 0 (the student's own answer)"), ((10, 20, 700, 800), "step 0 (the given box)")):
        shown.clear()
        student = scripted(lambda turn, i: protocol.answer_text(BOX))
        widgets.be_the_model(student, records, profile, path=path, box=box)
        text = shown[0][0][0].metadata["alt"]
        assert f"“{records[0]['expression']}”: {first}, IoU" in text and "step 2, IoU" in text
        assert len(student.model.shown) == (3 if box is None else 2)


@pytest.mark.parametrize(
    ("variable", "kernel", "expected"),
    [
        ("", object(), True),
        ("1", object(), False),
        ("", None, False),
    ],
)
def test_widgets_are_live_in_a_kernel_unless_the_course_is_run_by_machine(monkeypatch, variable, kernel, expected):
    import IPython

    monkeypatch.setenv("IVT_STATIC", variable)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    assert widgets.live() is expected
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    assert widgets.live() is False


def test_what_cannot_be_shown_is_one_sentence(records, methods, confident, tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="at least one method"):
        widgets.trajectory_explorer(records, {}, path=path)
    with pytest.raises(ValueError, match="at least one group"):
        widgets.group_viewer(records, [[]], 0.1, path=path)
    with pytest.raises(ValueError, match="'elsewhere' is about none of the records"):
        widgets.group_viewer(records, [[rollout("elsewhere", GOOD)]], 0.1, path=path)
    with pytest.raises(ValueError, match="needs rollouts with confidence"):
        widgets.stop_rule_slider(methods["one"], THRESHOLDS, Resampling(0, 50), path=path)


# ------------------------------------------------------------------------------------------------ live
def test_a_live_widget_holds_the_picture_for_readers_without_widgets(
    alive, records, methods, confident, scripted, shown, tmp_path
):
    student = scripted(lambda turn, i: pytest.fail("nothing is generated before the reader asks"))
    asked = [
        *displays(records, methods, confident, tmp_path),
        lambda: widgets.be_the_model(student, records, get_profile("micro"), path=tmp_path / "d.png"),
    ]
    for show in asked:
        shown.clear()
        show()
        [((data,), options)] = shown
        assert set(data) == {widgets.WIDGET, "image/png", "text/plain"} and options["raw"]
        assert options["metadata"]["image/png"]["alt"] == data["text/plain"]


def test_each_control_of_the_explorer_changes_the_picture(records, methods):
    panel = widgets._trajectory_panel(records, methods, "all", 1)
    method, kind, sample, step = (control(panel, name) for name in ("Method", "Filter", "Sample", "Step"))
    assert alt(panel).startswith("one, all, sample 1 of 5") and "At step 1: IoU 1.00" in alt(panel)
    step.value = 0
    assert "At step 0: IoU 0.67" in alt(panel)
    sample.value = 2
    assert "sample 2 of 5" in alt(panel) and "At step 0: IoU 1.00" in alt(panel)
    kind.value = "most improved"
    assert (sample.value, sample.max) == (1, 2) and "one, most improved (chosen with the ground truth)" in alt(panel)
    method.value = "other"
    assert (sample.max, step.max) == (1, 2) and alt(panel).startswith("other, most improved")
    kind.value = "most degraded"
    assert "No sample of other is among the most degraded (chosen with the ground truth)." in all_html(panel)
    method.value = "one"
    assert sample.max == 2 and "one, most degraded" in alt(panel)


def test_what_a_student_wrote_is_shown_as_text(records):
    wicked = rollout(records[0]["id"], GOOD, None)
    wicked["steps"][1]["text"] = '<script>alert("x")</script>'
    panel = widgets._trajectory_panel(records, {"one": [wicked]}, "all", 1)
    assert "<script>" not in all_html(panel) and "<script>" in unescape(all_html(panel))
    assert "no box in the answer" in alt(panel)


def test_each_control_of_the_group_viewer_changes_the_picture(records):
    groups = [
        [rollout(record["id"], BAD, box) for box in (GOOD, last)]
        for record, last in zip(records, (BAD, FAIR), strict=False)
    ]
    panel = widgets._group_panel(records, groups, 0.1, "none")
    assert "rollout 1: reward 1.10, advantage +0.50; rollout 2: reward 0.10, advantage -0.50" in alt(panel)
    control(panel, "Spread").value = "group"
    assert "advantage +0.71" in alt(panel) and "spread of the group" in alt(panel)
    control(panel, "Group").value = 2
    assert alt(panel).startswith("Group 2 of 2") and "reward 0.77" in alt(panel)
    control(panel, "Spread").value = "batch"
    assert "spread of all 4 rollouts" in alt(panel)


def test_each_control_of_the_stop_rule_changes_the_picture(confident):
    curves = {name: selection.rule_curve(confident, stop, THRESHOLDS) for name, stop in selection.STOPS.items()}
    panel = widgets._rule_panel(confident, curves, 0.5, "A note.", Resampling(0, 50), "validation")
    assert "“two boxes agree” at 0.50" in alt(panel)
    assert "oracle (best step, chosen with the ground truth)" in alt(panel)
    assert "A note." in all_html(panel) and "points more than the first answers" in all_html(panel)
    control(panel, "Threshold").value = 0.9
    assert "at 0.90" in alt(panel)
    control(panel, "Rule").value = "own verification, first enough"
    point = next(p for p in curves["own verification, first enough"] if p["threshold"] == 0.9)
    assert f"“own verification, first enough” at 0.90: Acc@0.5 {100 * point['acc50']:.1f} %" in alt(panel)
    assert ", ".join(f"step {t}: {count}" for t, count in enumerate(point["answers"])) in alt(panel)


def canvas_of(panel):
    return next(child for child in panel.children if type(child).__name__ == "BoxCanvas")


def submit(canvas, box) -> None:
    """What the front end does when the reader submits a box."""
    canvas.box, canvas.busy = list(box), True
    canvas.submits += 1


def test_a_submitted_box_is_scored_and_the_student_goes_on_from_it(scripted, records):
    student = scripted(lambda turn, i: protocol.answer_text(BOX, "It fits: keep it.") if turn == 0 else "the star")
    panel = widgets._model_panel(student, records, get_profile("micro"), 0)
    canvas = canvas_of(panel)
    assert canvas.label == records[0]["expression"] and canvas.image.startswith("data:image/png;base64,")
    assert canvas.truth == [] and "<img" not in all_html(panel)  # the truth comes with the answer, not before it
    submit(canvas, (101, 99, 603, 804))
    assert canvas.box == [100, 100, 600, 800] and canvas.truth == [round(v) for v in records[0]["bbox"]]
    scored = {**rollout("a", (100, 100, 600, 800)), "truth": records[0]["bbox"]}
    value = f"IoU {metrics.iou_matrix([scored])[0, 0]:.2f}"
    mine, theirs = canvas.status.split(" The student: ")
    assert mine == f"Your box: 100, 100, 600, 800. {value} with the truth (dashed)."
    assert theirs.startswith("step 1, IoU") and not canvas.busy
    html = all_html(panel)
    assert f"step 0 (your box), {value}" in html and html.count("<img") == 3 and "It fits: keep it." in html
    assert "step 2, no box in the answer" in html and "“the star”" in html
    assert len(student.model.shown) == 2


def test_the_next_picture_begins_anew(scripted, records):
    panel = widgets._model_panel(scripted(lambda turn, i: "none"), records, get_profile("micro"), len(records) - 1)
    canvas, first = canvas_of(panel), canvas_of(panel).image
    submit(canvas, BOX)
    control(panel, "Next picture").click()
    assert control(panel, "Picture").value == 1
    assert canvas.label == records[0]["expression"] != records[-1]["expression"]
    assert (canvas.box, canvas.truth, canvas.status) == ([], [], "") and canvas.image != first
    assert "<img" not in all_html(panel)


def test_a_student_that_fails_says_why_and_the_canvas_stays_usable(scripted, records):
    def fail(turn, i):
        raise RuntimeError("it is gone")

    panel = widgets._model_panel(scripted(fail), records, get_profile("micro"), 0)
    submit(canvas_of(panel), BOX)
    assert canvas_of(panel).status == "The student could not answer: it is gone" and not canvas_of(panel).busy


def test_a_real_student_answers_from_a_readers_box(tiny_student, records):
    panel = widgets._model_panel(tiny_student, records, get_profile("micro"), 0)
    submit(canvas_of(panel), BOX)
    assert "IoU" in canvas_of(panel).status and all_html(panel).count("<img") == 3


def test_colab_is_told_to_show_our_widgets(monkeypatch):
    """Without a call of `enable_custom_widget_manager` Colab does not load them; anywidget makes it for us."""
    import sys

    from anywidget import _util

    from ivt_utils.show.box_canvas import canvas_class

    told = []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: told.append(1))
    colab = SimpleNamespace(output=output)
    modules = {"google": SimpleNamespace(colab=colab), "google.colab": colab, "google.colab.output": output}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    _util.enable_custom_widget_manager_once.cache_clear()
    canvas_class()()
    _util.enable_custom_widget_manager_once.cache_clear()
    assert told == [1]


def test_the_figure_lies_behind_the_widget_also_for_colab(monkeypatch, tmp_path):
    """Colab's ipywidgets 7 has no public way to its bundle; its front end needs the model's id alone."""
    said = []
    monkeypatch.setattr(ipython, "display", lambda data, **options: said.append((data, options)))
    widgets.present((plt.figure(), "four words of alt", ""), tmp_path / "x.png", SimpleNamespace(model_id="abc"))
    ((data, options),) = said
    assert data[widgets.WIDGET] == {"version_major": 2, "version_minor": 0, "model_id": "abc"}
    assert data["text/plain"] == options["metadata"]["image/png"]["alt"] == "four words of alt" and data["image/png"]
