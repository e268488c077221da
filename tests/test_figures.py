"""The figures of a training: what is drawn, and the alt text that tells it."""

import matplotlib.pyplot as plt
import pytest

from ivt_utils.metrics import Resampling
from ivt_utils.show.figures import curves_figure, log_figure

ROW = {
    "reward": 0.5,
    "iou_step_0": 0.4,
    "iou_step_1": 0.5,
    "failed_rollouts": 0.0,
    "equal_groups": 0.1,
    "kl": 0.0,
    "entropy": 1.0,
}


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
