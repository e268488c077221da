"""The sentences of notebooks 3 and 4: the interval chooses each, and every choice is a whole sentence."""

from itertools import product

import pytest

from ivt_utils import findings
from ivt_utils.figures import side

LIMITS = {"above": (0.01, 0.02), "below": (-0.02, -0.01), "open": (-0.01, 0.01)}
CELLS = {where: {"low": low, "high": high} for where, (low, high) in LIMITS.items()}
GAINS = ("oracle best step - single shot", "step 0 - single shot", "final - step 0", "final - single shot")


@pytest.mark.parametrize("where", CELLS)
def test_a_side_is_that_of_the_whole_interval(where):
    assert side(CELLS[where]) == where and side({"low": None, "high": None}) == "open"
    assert side({"low": 0.6, "high": 0.7}, 0.5) == "above" and side({"low": 0.0, "high": 0.7}) == "open"


def test_every_interval_has_a_sentence_of_its_own():
    after_sft, after_grpo, traces = set(), set(), set()
    for a, b in product(CELLS, CELLS):
        gains = {what: CELLS[a if what.startswith("final") else b] for what in GAINS}
        after_sft.add(findings.after_sft(gains, gains, CELLS[a]))
        acts = {"difference": CELLS[b]}
        after_grpo.add(findings.after_grpo(*[CELLS[a]] * 2, CELLS[b], CELLS[b], CELLS[a], CELLS[b], acts))
        true = {limit: value + 0.5 for limit, value in CELLS[a].items()}
        traces.add(findings.of_traces({"true": true | {"n": 9}, "heeded": CELLS[b]}))
    assert findings.of_traces({"true": {"n": 0}}) == "None of its traces names a problem."
    assert len(after_sft) == len(after_grpo) == len(traces) == 9
    assert all(text.replace("*", "").endswith(".") and "  " not in text for text in after_sft | after_grpo | traces)


def test_the_sentences_name_the_side():
    gains = dict.fromkeys(GAINS, CELLS["below"])
    text = findings.after_sft(gains | {"final - step 0": CELLS["above"]}, gains, CELLS["above"])
    assert "final step lies above step 0" in text and "the training has a price" in text
    acts = {"difference": CELLS["above"]}
    text = findings.after_grpo(CELLS["above"], CELLS["below"], None, None, CELLS["open"], CELLS["open"], acts)
    assert "something to mend" in text and "does better there" in text and "more often than it keeps it" in text
    assert "long loop" not in text
