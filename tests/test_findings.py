"""The sentences of notebooks 3 to 6: the interval chooses each, and every choice is a whole sentence."""

from itertools import product

import pytest

from ivt_utils import closer
from ivt_utils.closer import BASE, CLOSER, TAUGHT
from ivt_utils.controls import TRUTH
from ivt_utils.metrics import Resampling, iou_matrix, paired_difference, side, step_score
from ivt_utils.runtime.files import read_json, read_jsonl
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.show import findings

LIMITS = {"above": (0.01, 0.02), "below": (-0.02, -0.01), "open": (-0.01, 0.01)}
CELLS = {where: {"value": (low + high) / 2, "low": low, "high": high} for where, (low, high) in LIMITS.items()}
ACTS = dict.fromkeys(("says", "does"), {"low": 0.3, "high": 0.6})
GAINS = ("oracle best step - single shot", "step 0 - single shot", "final - step 0", "final - single shot")


@pytest.mark.parametrize("where", CELLS)
def test_a_side_is_that_of_the_whole_interval(where):
    assert side(CELLS[where]) == where and side({"low": None, "high": None}) == "open"
    assert side({"low": 0.6, "high": 0.7}, 0.5) == "above" and side({"low": 0.0, "high": 0.7}) == "open"


def test_every_interval_has_a_sentence_of_its_own():
    after_sft, after_grpo, traces = set(), set(), set()
    for a, b in product(CELLS, CELLS):
        gains = {what: CELLS[a if what.startswith("final") else b] for what in GAINS}
        after_sft.add(findings.after_sft(gains, gains, CELLS[b], CELLS[a]))
        acts = ACTS | {"difference": CELLS[b]}
        after_grpo.add(
            findings.after_grpo(*[CELLS[a]] * 2, CELLS[b], CELLS[b], CELLS[a], CELLS[b], *[CELLS[a]] * 2, acts, acts)
        )
        told = {"true": {"n": 9}, "true_more": CELLS[a], "followed_more": CELLS[b], "unmoved": CELLS[a] | {"value": 0}}
        traces.add(findings.of_traces(told))
    assert findings.of_traces({"true": {"n": 0}}) == "None of its traces names a problem."
    assert len(after_sft) == len(after_grpo) == len(traces) == 9
    assert all(text.replace("*", "").endswith(".") and "  " not in text for text in after_sft | after_grpo | traces)


def test_the_sentences_name_the_side():
    gains = dict.fromkeys(GAINS, CELLS["below"])
    text = findings.after_sft(gains | {"final - step 0": CELLS["above"]}, gains, CELLS["below"], CELLS["above"])
    assert "final step lies above step 0" in text and "the training has a price" in text and "frame" not in text
    text = findings.after_sft(gains | {"final - step 0": CELLS["open"]}, gains, CELLS["below"], CELLS["above"])
    assert "mean IoU rises" in text and "improve is the frame" in text
    acts, cells = ACTS | {"difference": CELLS["above"]}, [CELLS["open"]] * 4
    text = findings.after_grpo(CELLS["above"], CELLS["below"], None, None, *cells, acts, acts)
    assert "something to mend" in text and "worse after GRPO" in text and "more often than it keeps it" in text
    assert "do not show that GRPO needs the loop" in text and "long loop" not in text and "leaves it" not in text
    never, always = {"low": 0.0, "high": 0.0}, {"low": 0.95, "high": 1.0}
    text = findings.after_grpo(
        CELLS["above"],
        CELLS["below"],
        None,
        None,
        *cells,
        acts | {"says": never},
        acts | {"says": always, "does": always},
    )
    assert "hardly ever says" in text and "leaves it there" in text


def test_the_ablations_are_told_part_by_part():
    rows = dict.fromkeys(
        (
            "training: errors that are distorted truths",
            "training: no traces",
            "loop: no box is drawn",
            "training: a box that fits is kept",
            "loop: T = 1",
            "loop: the box as an outline",
        ),
        "open",
    )
    assert findings.of_ablations(rows) == (
        "Nothing shows that this student owes anything to its own errors, the traces or the drawn box."
    )
    text = findings.of_ablations(rows | {"loop: T = 1": "below", "training: no traces": "below"})
    assert "to its own errors or the drawn box." in text and "for the traces and the number of steps.**" in text
    everything = findings.of_ablations(dict.fromkeys(rows, "above"))
    assert everything.startswith("**A difference is shown for its own errors, the traces, the drawn box, the number")


def test_a_threshold_the_controls_and_the_closer_look_are_told_by_their_sides():
    up, none = CELLS["above"], CELLS["open"]
    assert "So the two sets differ" in findings.of_threshold(up, none, up, none)
    assert "That is why the test set is scored once" in findings.of_threshold(up, none, none, none)
    found = {findings.of_threshold(CELLS[a], CELLS[b], none, none) for a, b in product(CELLS, CELLS)}
    assert len(found) == 3
    names = ("no box", "random box", TRUTH)

    def told(*sides):
        return findings.of_controls(
            [{"control": name, "difference": CELLS[side]} for name, side in zip(names, sides, strict=True)]
        )

    assert len({told(*sides) for sides in product(CELLS, repeat=3)}) == 27
    assert "hardly uses the drawn box" in told("open", "below", "open")
    assert "no sign" in told("above", "open", "above") and "some use" in told("open", "open", "above")
    assert "hardly" not in told("above", "below", "open") + told("open", "open", "above")
    looks = {
        findings.of_closer({f"{CLOSER} - {BASE}": CELLS[a], f"{CLOSER} - {TAUGHT}": CELLS[b]}, {})
        for a, b in product(CELLS, CELLS)
    }
    assert len(looks) == 9 and findings.of_closer({}, {}) == ""
    shot = {f"{CLOSER} - {BASE}": CELLS["open"], f"{CLOSER} - {TAUGHT}": CELLS["open"]}
    controls = (f"{CLOSER} - {closer.SEEN}", f"{closer.SEEN} - {closer.FIRST}", f"{CLOSER} - {closer.WHOLE}")
    oracle = f"{CLOSER} - {closer.AROUND_TRUTH}"
    looks = {
        findings.of_closer(
            shot | dict(zip((*controls, oracle), map(CELLS.get, sides), strict=True)), {controls[0]: CELLS[exact]}
        )
        for *sides, exact in product(CELLS, CELLS, CELLS, ("below", "open"), CELLS)
    }
    assert len(looks) == 27 * 2 * 3


REGIMES = (
    "sft_ivt final - sft_ivt step 0",
    "sft_ivt oracle best step - sft_ivt step 0",
    "sft_ivt final - consensus of as many sampled answers",
    "sft_ivt_long final - sft_ivt_long step 0",
    "sft_ivt_long oracle best step - sft_ivt_long step 0",
    "sft_ivt_long consensus of its steps - sft_ivt_long step 0",
    "sft_ivt consensus of its steps - sft_ivt step 0",
)
MIRAGE, SHIPPED, NOTHING = "**Here the mirage shows**", "can be shipped", "There is no mirage in it"


@pytest.mark.parametrize(
    ("sides", "says"),
    [
        ("open above open below above below open", (MIRAGE, MIRAGE)),
        ("open above above below above open above", (SHIPPED, MIRAGE)),
        ("above above below above above open open", (SHIPPED, SHIPPED)),
        ("open above open above open open below", (MIRAGE, NOTHING)),
        ("open open open below above above open", (NOTHING, SHIPPED)),
    ],
)
def test_where_the_mirage_shows_is_said_by_the_intervals(sides, says):
    rows = {name: CELLS[side] for name, side in zip(REGIMES, sides.split(), strict=True)}
    told = findings.of_regimes(rows, 2, 5)
    _, *parts = told.split("In the loop of ")
    assert [[text for text in (MIRAGE, SHIPPED, NOTHING) if text in part] for part in parts] == [[s] for s in says]
    place = {"above": "lies above", "below": "lies below", "open": "shows no difference from"}
    sampled, consensus = (place[sides.split()[i]] for i in (2, 5))
    assert f"refinements {sampled} the consensus of as many" in told
    assert f"consensus of its steps {consensus} it (" in told


def test_what_notebooks_1_and_2_say_of_the_base_student_is_what_the_reference_says():
    base, bare, train = (
        read_jsonl(REFERENCE / "rollouts" / f"{name}.jsonl") for name in ("base_ivt", "base_ivt_bare", "train_step0")
    )
    boxes, ious = [step["box"] for step in base[0]["steps"]], iou_matrix(base)[0]
    assert all(boxes) and boxes[0] != boxes[1] != boxes[2] and ious[0] < ious[-1]  # the live sample of notebook 1
    last, first = step_score("final", "acc50"), step_score("step0", "acc50")
    assert side(paired_difference(bare, bare, last, Resampling(0, 500), first)) == "below"
    rows = read_json(REFERENCE / "results.json")["second_turn"]
    same = {(row["words"], row["style"]): row["same"] for row in rows}
    bare_again, outlined, filled = (same["question", style] for style in ("none", "outline", "filled"))
    assert bare_again["value"] == 1 and bare_again["low"] > outlined["high"] and outlined["value"] > filled["value"]
    bare_again, outlined, filled = (same["feedback", style] for style in ("none", "outline", "filled"))
    assert bare_again["low"] > outlined["high"] and outlined["low"] < filled["value"] < outlined["high"]
    kept = [iou for iou in iou_matrix(train)[:, 0] if iou <= 0.85]
    assert sum(iou >= 0.5 for iou in kept) > len(kept) / 2


SFT = {
    "gains": dict.fromkeys(GAINS, CELLS["open"]),
    "variant": dict.fromkeys(GAINS, CELLS["open"]),
    "loss": CELLS["open"],
    "long_loss": CELLS["open"],
}
GRPO = dict.fromkeys(("loss", "final", "long_change", "keep_change", "rise", "gain", "loop", "alone"), CELLS["open"])
GRPO |= {"acts": ACTS | {"difference": CELLS["open"]}, "keep_acts": ACTS | {"difference": CELLS["open"]}}
TRACES = {"true": {"n": 9}, "unmoved": CELLS["open"] | {"value": 0}} | dict.fromkeys(
    ("true_more", "followed_more"), CELLS["open"]
)


@pytest.mark.parametrize(
    ("tell", "where", "above", "below"),
    [
        ("sft", ("gains", "final - step 0"), "the final step lies above step 0", "the final step lies below step 0"),
        ("sft", ("gains", "step 0 - single shot"), "step 0 has gained", "step 0 has fallen below"),
        ("sft", ("gains", "final - single shot"), "gives more right answers", "gives fewer right answers"),
        (
            "sft",
            ("gains", "oracle best step - single shot"),
            "best step lies above the single shot",
            "choose, lies below the single shot",
        ),
        ("sft", ("variant", "final - step 0"), "lies above its own step 0", "lies below its own step 0"),
        ("sft", ("variant", "final - single shot"), "and lies above the single shot", "and lies below the single shot"),
        ("sft", ("loss",), "mean IoU falls", "mean IoU rises"),
        ("sft", ("long_loss",), "the student loses IoU", "the student gains IoU"),
        ("grpo", ("loss",), "a step lost IoU after SFT", "a step gained IoU after SFT"),
        ("grpo", ("final",), "is better after GRPO", "is worse after GRPO"),
        ("grpo", ("long_change",), "trained, a step loses more", "trained, a step loses less"),
        ("grpo", ("keep_change",), "fits loses more there", "fits loses less there"),
        ("grpo", ("rise",), "last probe lies above", "last probe lies below"),
        ("grpo", ("alone",), "loop lies above the single", "loop lies below the single"),
        ("grpo", ("gain",), "step lies above the base", "step lies below the base"),
        ("grpo", ("loop",), "lies above GRPO without a loop", "lies below GRPO without a loop"),
        ("grpo", ("acts", "difference"), "fits more often than it keeps", "keeps its box more often"),
        ("traces", ("true_more",), "name are true more often", "name are true less often"),
        ("traces", ("followed_more",), "follows them more often", "follows them less often"),
    ],
)
def test_an_interval_above_is_not_told_as_one_below(tell, where, above, below):
    function, told = {
        "sft": (lambda told: findings.after_sft(**told), SFT),
        "grpo": (lambda told: findings.after_grpo(**told), GRPO),
        "traces": (findings.of_traces, TRACES),
    }[tell]

    def text(place):
        first, *rest = where
        changed = {rest[0]: CELLS[place]} if rest else CELLS[place]
        return function(told | {first: told[first] | changed if rest else changed})

    assert above in text("above") and below not in text("above")
    assert below in text("below") and above not in text("below")
    assert above not in text("open") and below not in text("open")
