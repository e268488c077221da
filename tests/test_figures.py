"""The figures of a training: what is drawn, and the alt text that tells it."""

import re

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from ivt_utils.metrics import Resampling
from ivt_utils.show.diagrams import DIAGRAMS
from ivt_utils.show.figures import course_in_one_picture, curves_figure, log_figure
from ivt_utils.show.tables import paper_results

ROW = {
    "reward": 0.5,
    "iou_step_0": 0.4,
    "iou_step_1": 0.5,
    "failed_rollouts": 0.0,
    "equal_groups": 0.1,
    "kl": 0.0,
    "entropy": 1.0,
}


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_fits_a_phone_and_its_words_stay_legible_within_it(name):
    figure = DIAGRAMS[name]()
    figure.draw_without_rendering()
    assert 85 * figure.get_figwidth() <= 350  # pixels in a notebook: nothing is scaled down on a phone
    frame, (ax,) = figure.bbox, figure.axes
    for text in ax.texts:
        place = text.get_window_extent()
        assert frame.x0 < place.x0 and place.x1 < frame.x1 and frame.y0 < place.y0 and place.y1 < frame.y1, text
        assert not text.get_text() or text.get_fontsize() * 85 / 72 >= 11  # pixels there
    assert figure.get_label() and figure.get_facecolor()[:3] > (0.9, 0.9, 0.9)
    plt.close(figure)


def test_the_advantages_of_the_drawn_group_are_those_of_the_rewards():
    figure = DIAGRAMS["group"]()
    told = re.findall(r"[+-]\d\.\d\d", figure.get_label())
    assert told == [text.get_text() for text in figure.axes[0].texts if re.fullmatch(r"[+-].+", text.get_text())]
    spread = [float(value) for value in told]
    assert len(told) == 6 and sum(spread) == pytest.approx(0, abs=0.03) and "made-up" in figure.get_label()
    arrows = [text for text in figure.axes[0].texts if not text.get_text()]  # y grows downwards
    assert [arrow.xyann[1] - arrow.xy[1] > 0 for arrow in arrows] == [value > 0 for value in spread]
    assert not [text for text in DIAGRAMS["group"]([0.5] * 6).axes[0].texts if not text.get_text()]


def test_a_learning_curve_has_a_panel_a_training_and_bands_without_width_at_first():
    rows = [{"step": 0, "ious": [[0.5, 0.4], [0.7, 0.6]]}, {"step": 10, "ious": [[0.5, 0.6], [0.7, 0.9]]}]
    curve = {"image_ids": ["a", "b"], "rows": rows}
    figure = curves_figure({"from SFT": curve, "from the variant": curve}, Resampling(0, 50))
    assert [ax.get_title() for ax in figure.axes] == ["from SFT", "from the variant"]
    first, final = figure.axes[0].lines
    assert list(first.get_ydata()) == pytest.approx([0.6, 0.6])
    assert list(final.get_ydata()) == pytest.approx([0.5, 0.75])
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == 0} == {0.5}
    assert {round(y, 6) for x, y in band if x == 10} == {0.7, 0.8}
    assert "from SFT, final answer: from 0.500 to 0.750" in figure.get_label()
    plt.close(figure)


def test_a_learning_curve_of_one_image_has_no_bands():
    rows = [{"step": step, "ious": [[0.5, 0.4]]} for step in (0, 10)]
    figure = curves_figure({"alone": {"image_ids": ["a"], "rows": rows}}, Resampling(0, 50))
    assert not figure.axes[0].collections and "alone, first answer: from 0.500 to 0.500" in figure.get_label()
    plt.close(figure)


def test_the_log_is_drawn_with_single_steps_and_their_running_mean():
    figure = log_figure([{"step": step, **ROW, "reward": step} for step in (1, 2, 3)], turns=1, window=3)
    single, mean = figure.axes[0].lines
    assert list(single.get_ydata()) == [1, 2, 3] and list(mean.get_ydata()) == pytest.approx([4 / 3, 2, 8 / 3])
    assert len(figure.axes[1].lines) == 4 and "reward" in figure.get_label()
    plt.close(figure)


def test_the_course_in_one_picture_judges_each_answer_and_draws_the_values_it_tells():
    def rollout(*boxes):
        steps = [{"text": "", "box": box} for box in boxes]
        return {"id": "a", "expression": "the star", "truth": [0, 0, 500, 500], "steps": steps}

    def method(value):
        cell = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 9}
        return {"metrics": {"final": {"acc50": cell}}}

    names = ("base_single", "base_ivt", "sft_ivt", "sft_grpo_ivt")
    results = {"methods": dict(zip(names, map(method, (0.9, 0.4, 0.8, 0.7)), strict=True))}
    mean = {"name": "sft_ivt", "metric": "acc50", "value": 0.85, "low": 0.8, "high": 0.9, "seeds": {"0": 0.8, "1": 0.9}}
    right, wrong = [0, 0, 500, 400], [600, 600, 900, 900]
    before, after = rollout(right, wrong, wrong), rollout(right, right, right)
    figure = course_in_one_picture(
        results | {"seeds": [mean]}, paper_results(), Image.new("RGB", (192, 192)), before, after
    )
    *panels, bars = figure.get_axes()
    titles = [ax.get_title().splitlines()[1] for ax in panels]
    assert titles == ["\u2713 right, IoU 0.80", "its own box", "\u2717 wrong, IoU 0.00", "\u2713 right, IoU 0.80"]
    assert [len(ax.patches) for ax in panels] == [2, 0, 2, 2]  # answer and truth
    widths = sorted(round(bar.get_width(), 1) for bar in bars.patches)
    assert widths == sorted([90.0, 40.0, 85.0, 70.0, 79.6, 48.7, 80.6])  # the paper's after SFT is not known
    for said in ("first answer: right, IoU 0.80", "second answer: wrong", "last answer 85.0 (the paper: not known)"):
        assert said in figure.get_label()
    smallest = min(text.get_fontsize() for text in figure.findobj(plt.Text) if text.get_text())
    assert smallest / 72 * 390 / figure.get_figwidth() >= 9  # pixels on a phone
    plt.close(figure)
