"""What the trainings of notebooks 3 and 4 did, in whole sentences, each chosen by where an interval lies."""

from ivt_utils.figures import side


def of_traces(told: dict[str, dict]) -> str:
    """Return what the cells of `trace_check.traces_told` say of a student's words."""
    if not told["true"]["n"]:
        return "None of its traces names a problem."
    true = {
        "above": "The first problem that the student names is true more often than a coin would be.",
        "below": "The first problem that the student names is true less often than a coin would be.",
        "open": "The first problem that the student names cannot be told from the toss of a coin.",
    }
    moves = {
        "above": "Its boxes change as its traces say more often than the opposite way.",
        "below": "Its boxes change the opposite way more often than as its traces say.",
        "open": "That its boxes heed its traces is not shown: they also change the opposite way.",
    }
    return f"**{true[side(told['true'], 0.5)]}** {moves[side(told['heeded'])]}"


def after_sft(gains: dict[str, dict], variant: dict[str, dict], long_loss: dict) -> str:
    """Return what SFT did, from differences of Acc@0.5 and from the IoU lost a step over the long loop.

    `gains` and `variant`, that of the student that keeps what fits: cells under "oracle best step - single shot",
    "step 0 - single shot", "final - step 0" and "final - single shot".
    """
    loop = {
        "above": "**The loop now helps: the final step lies above step 0.**",
        "below": "**The loop still harms: the final step lies below step 0.**",
        "open": "**The final step cannot be told from step 0: nothing shows that two further answers help.**",
    }
    price = {
        "above": "Step 0 has gained from the training.",
        "below": "Step 0 has fallen below the untrained single shot: the training has a price.",
        "open": "Step 0 cannot be told from the untrained single shot.",
    }
    user = {
        "above": "Whoever uses the loop gets more than one untrained answer gave.",
        "below": "Whoever uses the loop gets less than one untrained answer gave.",
        "open": "Against one untrained answer the loop shows no gain.",
    }
    best = {
        "above": "The best step lies above the single shot, as in the paper, but only an oracle can choose it.",
        "below": "Even the best step, which only an oracle can choose, lies below the single shot.",
        "open": "Even the best step, which only an oracle can choose, shows no gain over the single shot.",
    }
    long = {
        "above": "Asked for more steps than it has learnt, the student loses IoU.",
        "below": "Asked for more steps than it has learnt, the student gains IoU.",
        "open": "Asked for more steps than it has learnt, the student shows neither loss nor gain of IoU.",
    }
    keeps = {"above": "lies above", "below": "lies below", "open": "cannot be told from"}
    found, kept = ({what: side(cell) for what, cell in cells.items()} for cells in (gains, variant))
    return " ".join((
        loop[found["final - step 0"]], price[found["step 0 - single shot"]], user[found["final - single shot"]],
        best[found["oracle best step - single shot"]], long[side(long_loss)],
        f"The final step of the student that keeps what fits {keeps[kept['final - step 0']]} its own step 0 and "
        f"{keeps[kept['final - single shot']]} the single shot.",
    ))  # fmt: skip


def after_grpo(
    loss: dict, change: dict, long_change: dict | None, keep_change: dict | None, rise: dict, gain: dict, acts: dict,
) -> str:
    """Return what GRPO did to the student of the straight line, and to the one that keeps what fits.

    `loss`: the IoU that a step lost after SFT; `change`, `long_change`: how much more it loses after GRPO, in the short
    and in the long loop (None: there is none); `keep_change`: the latter for the student that keeps; `rise`: of the
    probes, last quarter minus first; `gain`: its final step minus the base student's single shot; `acts`: what
    `trace_check.says_and_does` says of it.
    """
    mend = {
        "above": "With two refinements a step lost IoU after SFT, so there was something to mend.",
        "below": "With two refinements a step gained IoU after SFT, so there was nothing to mend.",
        "open": "With two refinements a step showed no loss of IoU after SFT, so there was hardly anything to mend.",
    }
    less = {
        "above": "After GRPO a step does worse there.",
        "below": "After GRPO a step does better there.",
        "open": "After GRPO no change of that is shown.",
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
        "above": "The probes rise from the first quarter of the training to the last.",
        "below": "The probes fall from the first quarter of the training to the last.",
        "open": "The probes show no rise from the first quarter of the training to the last.",
    }
    shot = {
        "above": "The final step lies above the base student's single shot.",
        "below": "The final step lies below the base student's single shot.",
        "open": "The final step cannot be told from the base student's single shot.",
    }
    words = {
        "above": "At its last step the student says that its box fits more often than it keeps it.",
        "below": "At its last step the student keeps its box more often than it says that it fits.",
        "open": "At its last step the student says that its box fits about as often as it keeps it.",
    }
    return " ".join(filter(None, (
        mend[side(loss)], less[side(change)], long_change and long[side(long_change)],
        keep_change and keeps[side(keep_change)], curve[side(rise)],
        shot[side(gain)], words[side(acts["difference"])],
    )))  # fmt: skip
