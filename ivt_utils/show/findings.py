"""What notebooks 3 to 6 found, in whole sentences, each chosen by where an interval lies."""

from ivt_utils.closer import AROUND_TRUTH, BASE, CLOSER, FIRST, SEEN, TAUGHT, WHOLE
from ivt_utils.controls import OWN, RANDOM, TRUTH
from ivt_utils.metrics import side
from ivt_utils.schema import Cell
from ivt_utils.show.figures import cell_text
from ivt_utils.show.results import CONSENSUS

RARE = 0.1  # a share below it


def of_traces(told: dict[str, Cell]) -> str:
    """Return what the cells of `trace_check.traces_told` say of a student's words."""
    if not told["true"]["n"]:
        return "None of its traces names a problem."
    true = {
        "above": "The problems that its traces name are true more often than shuffled ones.",
        "below": "The problems that its traces name are true less often than shuffled ones.",
        "open": "As far as these samples show, the problems that its traces name are as true as shuffled ones.",
    }
    moves = {
        "above": "Its next box follows them more often than shuffled ones.",
        "below": "Its next box follows them less often than shuffled ones.",
        "open": "Its next box is not shown to follow them.",
    }
    stays = f"After {cell_text(told['unmoved'], 100)} % of those that name a problem, the box stays where it is."
    return f"**{true[side(told['true_more'])]}** {moves[side(told['followed_more'])]} {stays}"


def after_sft(gains: dict[str, Cell], variant: dict[str, Cell], loss: Cell, long_loss: Cell | None) -> str:
    """Return what SFT did, from differences of Acc@0.5 and from the IoU lost a step, over the loop and the long one.

    `long_loss` is None where there is no longer loop.
    `gains` and `variant`, that of the student that keeps what fits: cells under "oracle best step - single shot",
    "step 0 - single shot", "final - step 0" and "final - single shot".
    """
    place = {"above": "lies above", "below": "lies below", "open": "shows no difference from"}
    iou = {"above": "mean IoU falls", "below": "mean IoU rises", "open": "mean IoU shows no change"}
    frame = "What two refinements are seen to improve is the frame, not the choice of the object."
    price = {
        "above": "At IoU 0.5, step 0 has gained from the training.",
        "below": "At IoU 0.5, step 0 has fallen below the untrained single shot: the training has a price.",
        "open": "At IoU 0.5, step 0 shows no difference from the untrained single shot.",
    }
    user = {
        "above": "Against one untrained answer the loop gives more right answers.",
        "below": "Against one untrained answer the loop gives fewer right answers.",
        "open": "The loop is not shown to be better than one untrained answer.",
    }
    best = {
        "above": "The best step lies above the single shot, as in the paper, but only an oracle can choose it.",
        "below": "Even the best step, which only an oracle can choose, lies below the single shot.",
        "open": "Even the best step, which only an oracle can choose, shows no gain over the single shot.",
    }
    long = {
        "above": "Asked for more steps than it has learned, the student loses IoU.",
        "below": "Asked for more steps than it has learned, the student gains IoU.",
        "open": "Asked for more steps than it has learned, the student shows neither loss nor gain of IoU.",
    }
    sides, sides_keep = ({what: side(cell) for what, cell in cells.items()} for cells in (gains, variant))
    change = sides["final - step 0"], side(loss)
    return _text(
        f"**At IoU 0.5 the final step {place[change[0]]} step 0; on the way {iou[change[1]]}.**",
        change == ("open", "below") and frame,
        price[sides["step 0 - single shot"]],
        user[sides["final - single shot"]],
        best[sides["oracle best step - single shot"]],
        long_loss and long[side(long_loss)],
        f"The final step of the student that keeps what fits {place[sides_keep['final - step 0']]} its own step 0 and "
        f"{place[sides_keep['final - single shot']]} the single shot.",
    )


def after_grpo(
    loss: Cell,
    final: Cell,
    long_change: Cell | None,
    keep_change: Cell | None,
    rise: Cell,
    gain: Cell,
    loop: Cell,
    alone: Cell,
    acts: dict[str, Cell],
    keep_acts: dict[str, Cell],
) -> str:
    """Return what GRPO did to the student of the straight line, and to the one that keeps what fits.

    `loss`: the IoU that a step lost after SFT; `final`: mean IoU of the final step, GRPO's minus SFT's; `long_change`:
    how much more IoU a step loses after GRPO in the long loop (None: there is none); `keep_change`: the same for the
    student that keeps; `rise`: of the probes, the last minus the first; `gain`, `loop`: mean IoU of its final step
    minus the base student's single shot, and minus that of GRPO without a loop; `alone`: the latter minus the single
    shot; `acts`, `keep_acts`: what
    `trace_check.says_and_does` says of the two students.
    """
    mend = {
        "above": "With two refinements a step lost IoU after SFT, so there was something to mend.",
        "below": "With two refinements a step gained IoU after SFT, so there was nothing to mend.",
        "open": "With two refinements a step showed no loss of IoU after SFT, so there was hardly anything to mend.",
    }
    ends = {
        "above": "There the final answer is better after GRPO than before it, in mean IoU.",
        "below": "There the final answer is worse after GRPO than before it, in mean IoU.",
        "open": "There the final answer shows no change in mean IoU.",
    }
    long = {
        "above": "**Over the long loop, in which it was trained, a step loses more than before.**",
        "below": "**Over the long loop, in which it was trained, a step loses less than before.**",
        "open": "**Over the long loop, in which it was trained, no change is shown.**",
    }
    keeps = {
        "above": "The student that keeps what fits loses more there than before.",
        "below": "**The student that keeps what fits loses less there than before.**",
        "open": "For the student that keeps what fits no change is shown.",
    }
    curve = {
        "above": "The last probe lies above the first one.",
        "below": "The last probe lies below the first one.",
        "open": "The last probe shows no difference from the first one.",
    }
    shot = {
        "above": "The final step lies above the base student's single shot, in mean IoU.",
        "below": "The final step lies below the base student's single shot, in mean IoU.",
        "open": "The final step shows no difference from the base student's single shot, in mean IoU.",
    }
    needed = {
        "above": "It also lies above GRPO without a loop, so the loop adds something.",
        "below": "It lies below GRPO without a loop: a single answer does better.",
        "open": "No difference from GRPO without a loop is shown: these samples do not show that GRPO needs the loop.",
    }
    rival = {
        "above": "GRPO without a loop lies above the single shot.",
        "below": "GRPO without a loop lies below the single shot.",
        "open": "GRPO without a loop shows no difference from the single shot.",
    }
    words = {
        "above": "At its last step the student says that its box fits more often than it keeps it.",
        "below": "At its last step the student keeps its box more often than it says that it fits.",
        "open": "At its last step the student says that its box fits about as often as it keeps it.",
    }
    sentence = words[side(acts["difference"])]
    if side(acts["says"], RARE) == "below":
        sentence = "At its last step this student hardly ever says that its box fits, even where it keeps it."
    settled = all(side(keep_acts[what], 1 - RARE) == "above" for what in ("says", "does"))
    return _text(
        mend[side(loss)],
        ends[side(final)],
        shot[side(gain)],
        needed[side(loop)],
        rival[side(alone)],
        sentence,
        long_change and long[side(long_change)],
        keep_change and keeps[side(keep_change)],
        settled
        and "After GRPO the student that keeps what fits nearly always says at the last step that its box "
        "fits, and leaves it there: so its loop changes little, for better or worse.",
        curve[side(rise)],
    )


def of_ablations(where: dict[str, str]) -> str:
    """Return what the table of ablations shows, from where each row of `ablations.run_ablations` lies.

    `where`: by the row's name "above", "below" or "open", the last also where Holm's correction leaves no finding.
    """
    parts = {
        "training: errors that are distorted truths": "its own errors",
        "training: no traces": "the traces",
        "loop: no box is drawn": "the drawn box",
    }
    rest = [row for row, side_found in where.items() if side_found != "open" and row not in parts]
    parts_told = [part for row, part in parts.items() if where[row] != "open"]
    parts_told += ["the number of steps"] * any(row.startswith("loop: T") for row in rest)
    parts_told += ["a training that keeps what fits"] * any(row.startswith("training") for row in rest)
    missing = [part for row, part in parts.items() if where[row] == "open"]
    return _text(
        missing and f"Nothing shows that this student owes anything to {_listed(missing, 'or')}.",
        parts_told and f"**A difference is shown for {_listed(parts_told, 'and')}.**",
    )


def of_threshold(val: Cell, test: Cell, final_val: Cell, final_test: Cell) -> str:
    """Return what a threshold is worth, from its gain over step 0 on validation, where it was chosen, and on test.

    `final_val`, `final_test`: the gain of the final step, for which nothing was chosen, on the same samples.
    """
    finals = (
        f"The final step, for which nothing was chosen, gains {cell_text(final_val, 100)} points on the validation "
        f"samples and {cell_text(final_test, 100)} on the test samples."
    )
    if side(val) == "above" and side(test) == "open":
        told = "The gain on the samples that chose the threshold does not show on others."
        if side(final_val) == "above" and side(final_test) == "open":
            return f"{told} {finals} So the two sets differ, and the choice of a threshold is not to blame."
        told = f"{told} That is why the test set is scored once, at the end."
    elif side(val) == side(test) == "above":
        told = "The gain is there on samples that had no say in the choice as well."
    else:
        told = "Only the second number counts, for the first is that of the samples that chose the threshold."
    return f"{told} {finals}"


def of_controls(rows: list[dict]) -> str:
    """Return what the drawn box does to the next answer, from `controls.control_rows`."""
    cells = {row["control"]: row["difference"] for row in rows}
    numbers = (
        f"In points of Acc@0.5, each against the own box: no box {cell_text(cells['no box'], 100)}, a random box "
        f"{cell_text(cells[RANDOM], 100)}, the true box {cell_text(cells[TRUTH], 100)}."
    )
    presence, random, true = (side(cells[name]) for name in ("no box", RANDOM, TRUTH))
    bare = {
        "above": "Without a box it answers better than with its own.",
        "below": "Without a box it answers worse than with its own.",
        "open": "Without a box its answers show no difference from those with its own.",
    }
    foreign = {
        "above": "A random box even helps.",
        "below": "A random box costs something, but it also contradicts the chat.",
        "open": "A random box shows no harm, although it also contradicts the chat.",
    }
    best = {
        "above": "The true box helps, and no box does not: so it makes some use of how good the drawn box is.",
        "below": "Even the true box harms it.",
        "open": "The true box shows no help.",
    }
    harmed = [name for name, cell in cells.items() if name.startswith(OWN) and side(cell) == "below"]
    hardly = "So this student hardly uses the drawn box, neither that there is one nor how good it is."
    if harmed:
        hardly = (
            "Its own box costs something when it is moved. A better box or none changes nothing that these samples "
            "show, so this student hardly uses the drawn box."
        )
    if presence == true == "above":
        best["above"] = "The true box helps, but so does no box: that is no sign that it sees how good a box is."
    return " ".join((numbers, bare[presence], foreign[random], best[true], *[hardly] * (presence == true == "open")))


def of_closer(gains: dict[str, Cell], iou_gains: dict[str, Cell]) -> str:
    """Return what the closer look is worth, from its gains of Acc@0.5 and of mean IoU in the mean of the seeds.

    A Markdown list with an item for each rival; "" without gains.
    """
    if not gains:
        return ""
    over, rival = (side(gains[f"{CLOSER} - {name}"]) for name in (BASE, TAUGHT))
    shot = {
        "above": "it gains, and no step was selected for that.",
        "below": "it loses.",
        "open": "it shows no gain.",
    }
    credit = {
        "above": "the second look adds something.",
        "below": "that student does better with its single answer.",
        "open": "no difference is shown. So the gain may be the training's, and the second look gets no credit for it.",
    }
    items = (
        f"**Against the base student's single answer** {shot[over]}",
        f"**Against a student that was trained as long on the truth and answers once**, {credit[rival]}",
        *_controls_of_closer(gains, iou_gains),
    )
    return "\n".join(f"- {item}" for item in items)


def _controls_of_closer(gains: dict[str, Cell], iou_gains: dict[str, Cell]):
    """Yield what the controls say of new pixels, of a part by itself, of all pixels at once; nothing without them."""
    if f"{CLOSER} - {SEEN}" not in gains:
        return
    pixels, part, whole = (
        side(gains[name]) for name in (f"{CLOSER} - {SEEN}", f"{SEEN} - {FIRST}", f"{CLOSER} - {WHOLE}")
    )
    right = {
        "above": "new pixels give more right answers",
        "below": "new pixels give fewer right answers",
        "open": "no difference is shown in right answers",
    }[pixels]
    exact = {
        "above": "and the boxes are more exact with new pixels",
        "below": "and the boxes are less exact with new pixels",
        "open": "and none in mean IoU",
    }[side(iou_gains[f"{CLOSER} - {SEEN}"])]
    still = {
        "above": "Even without new pixels the look lies above the first answer, so detail is not its main merit.",
        "below": "Without new pixels it lies below the first answer.",
        "open": "Without new pixels it is not shown to lie above the first answer.",
    }[part]
    yield f"**Against a look without new pixels**, {right}, {exact}. {still}"
    if side(gains[f"{CLOSER} - {AROUND_TRUTH}"]) == "below":
        yield (
            "**Around the true box**, where only an oracle can look, it would do better, because a bad first answer "
            "sends it to the wrong place."
        )
    told = {
        "above": "it gains, but the vision encoder of that student was made for smaller images",
        "below": "it loses, so who can pay for so many image tokens needs no second look",
        "open": "no difference is shown",
    }[whole]
    yield f"**Against a student that learns the truth from the whole image, with all its pixels**, {told}."


def of_regimes(rows: dict[str, Cell], turns: int, long_turns: int) -> str:
    """Return in which loop the mirage shows after SFT, from differences of Acc@0.5 over several trainings, by name."""
    place = {"above": "lies above", "below": "lies below", "open": "shows no difference from"}
    short, long = "sft_ivt", "sft_ivt_long"
    sides = {name: side(row) for name, row in rows.items()}
    final, oracle = (
        {name: sides[f"{name} {step} - {name} step 0"] for name in (short, long)}
        for step in ("final", "oracle best step")
    )
    sampled = f"{short} final - consensus of as many sampled answers"
    rule = {name: sides[f"{name} {CONSENSUS} - {name} step 0"] for name in (short, long)}
    sentences = [
        f"The final step of {turns} refinements {place[sides[sampled]]} the consensus of as many sampled answers "
        f"({cell_text(rows[sampled], 100)} points)."
    ]
    for name, count in ((short, turns), (long, long_turns)):
        by = [
            cell_text(rows[f"{name} {step} - {name} step 0"], 100) for step in ("final", CONSENSUS, "oracle best step")
        ]
        sentences.append(
            f"In the loop of {count} the final step {place[final[name]]} step 0 ({by[0]}), and the consensus of its "
            f"steps {place[rule[name]]} it ({by[1]}); an oracle's choice stands at {by[2]}."
        )
        if oracle[name] != "above":
            sentences.append("There is no mirage in it, for not even an oracle is shown to gain from choosing a step.")
        elif "above" in (final[name], rule[name]):
            sentences.append("So a part of what an oracle gains there can be shipped.")
        else:
            sentences.append(
                "**Here the mirage shows**: the best step, which only an oracle can choose, lies above step 0, "
                "and neither of these does."
            )
    return " ".join(sentences)


def _text(*sentences) -> str:
    """Return the sentences that there are, one after the other."""
    return " ".join(sentence for sentence in sentences if sentence)


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))
