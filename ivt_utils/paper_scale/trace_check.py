"""What a trace claims, read back from free text and compared with the boxes it was written for.

Only the words of `protocol.PROBLEMS` and a few like them are read. Text that asks for changes in other words is
refused, for it could contradict the boxes unseen.
"""

import re
from itertools import pairwise
from typing import Any

import numpy as np

from ivt_utils import metrics, protocol
from ivt_utils.metrics import Resampling
from ivt_utils.schema import Rollout
from ivt_utils.teacher import problems

# What an answer may claim: word -> the problems of `protocol.PROBLEMS`, one of which the box must then have.
ERRORS = {problem.split()[-1]: (problem,) for problem in protocol.PROBLEMS} | {
    "up": ("too high",),
    "down": ("too low",),
    "small": ("too narrow", "too short"),
    "large": ("too wide", "too tall"),
    "big": ("too wide", "too tall"),
}
CHANGES = {advice.split()[-1]: (problem,) for problem, advice in protocol.PROBLEMS.items()} | {
    "upwards?": ("too low",),
    "downwards?": ("too high",),
    "larger": ("too narrow", "too short"),
    "bigger": ("too narrow", "too short"),
    "smaller": ("too wide", "too tall"),
}
FILLERS = (
    "it|the|red|box|whole|a|bit|little|lot|slightly|somewhat|much|far|further|farther|more|over|to|towards?|and|both"
)
NUMBERS = re.compile(
    r"[\d{}\[\]<>|`]|coordinate|json|bbox|\b(?:hundred|thousand|pixel|percent|twice|third|quarter)|"
    r"\bby (?:about |roughly )?(?:one|two|three|half)\b"
)
KNOWS = re.compile(
    r"ground.?truth|\btruth\b|annotat|\b(?:was|were|am|been) (?:told|given|provided)\b|\bstudent's|"
    r"\b(?:true|correct|right|target|actual|reference|desired|intended|expected|second|other|given|provided) "
    r"(?:bounding )?box\b|\b(?:true|correct|target|actual|intended|expected) (?:location|position|place|spot)|"
    r"\bwhere (?:it|the (?:red )?box) (?:belongs|should)"
)
BOX = r"(?:it|the (?:red |whole )?box)\b"
UNCHECKED = re.compile(  # changes that are not read here, and so could contradict the boxes unseen
    r"\b(?:extend|stretch|expand|enlarg|shrink|trim|crop|rais|widen|narrow|reduc|increas|halv|doubl)\w*|"
    r"\b(?:lower|higher|go|goes|going)\b|\bnot (?:\w+ )?\w+ enough|"
    rf"\b(?:cut|grow|lift|drop|pull|push|drag|slide|nudge|bring) {BOX}|"
    r"\b(?:its|box's) (?:left|right|top|bottom|upper|lower)\b|"
    rf"\b(?:left|right|top|bottom|upper|lower) edge|\b(?:edge|side|border|corner|top|bottom)s? of {BOX}"
)
DENIES = re.compile(r"(?:\bnot|n't|\bnever|\bno need|\bwithout)(?: \w+){0,2}? (?:too|move|moving|shift|make|making)\b")
FITS = re.compile(
    rf"\bkeep {BOX}|(?:^|[.;,:] ?){BOX} (?:already |now )?fits\b|\b(?:is|looks) (?:already |now )?"
    r"(?:perfect|correct|fine|accurate)\b"
)
MISFITS = re.compile(r"(?:\bnot|n't|\bhardly|\bnever|\bbadly|\bpoorly)\b.{0,15}\bfit")


def tidy(answer: str) -> str:
    """Return an answer on one line, without the quotation marks around it."""
    return " ".join(answer.split()).strip('"“” ')


def claims(text: str) -> tuple[list[tuple[str, tuple]], str]:
    """Return what a text in lower case says of its box, and the rest of the text.

    A claim is (its word, the problems one of which the box must have).
    """
    pairs, rest = [], text
    for opens, meanings in (("too", ERRORS), (r"mov(?:e|es|ed|ing)|shift\w*|ma(?:ke|kes|de|king)|be|become", CHANGES)):
        words = rf"(?:[ ,]+(?:{FILLERS}|{'|'.join(meanings)})\b)+"
        for match in re.finditer(rf"\b(?:{opens})\b({words})", text):
            said = re.findall(r"\w+", match[1])
            pairs += [(w, meaning) for w in said for form, meaning in meanings.items() if re.fullmatch(form, w)]
            rest = rest.replace(match[0], " ")
    return pairs, rest


def objection(answer: str, box, truth) -> str:
    """Return why an answer cannot be the trace from `box` to `truth` (0..1000), to be read after "it"; "" if it can.

    It must be one or two whole sentences without numbers, must not show that the truth is known, and must agree with
    the boxes: claim nothing that they contradict, and name the largest error or the second one, if that is above the
    teacher's tolerance. Of the true box alone may it say that it fits.
    """
    text = tidy(answer).lower().replace("’", "'")
    wrong, (claimed, rest) = problems(box, truth, most=len(protocol.PROBLEMS)), claims(text)
    false = [word for word, meaning in claimed if not set(meaning) & set(wrong)]
    problems_named = {problem for _, meaning in claimed for problem in meaning}
    objections = {
        "is empty": not text,
        "holds numbers, brackets or code": NUMBERS.search(text),
        "shows that the box it should become is known": KNOWS.search(text),
        "is not one or two whole sentences": not 1 <= len(re.findall(r"[.!?]+(?= |$)", text)) <= 2
        or not text.endswith((".", "!")),
        "speaks of edges, or of changes in other words than those given": UNCHECKED.search(rest),
        "says what not to do": wrong and DENIES.search(text),
        "asks for a change, but the box fits": not wrong and claimed,
        "does not say that the box fits": not wrong
        and (MISFITS.search(text) or not re.search(r"\b(?:fits?|keep)\b", text)),
        "says that the box fits, but it does not": wrong and FITS.search(text),
        f'says "{"".join(false[:1])}" of a box that is {" and ".join(wrong[:2])}': false,
        f"does not say that the box is {' or '.join(wrong[:2])}": wrong
        and not problems_named & set(problems(box, truth)),
    }
    return next((reason for reason, holds in objections.items() if holds), "")


# What is asked of a trace, which speaks of the box of the step before; of several problems the first one counts.
TOLD = {
    "true": "the problem named is true, however small",
    "true_shuffled": "the same, with the traces shuffled",
    "true_more": "the difference of these two",
    "followed": "the box then changes as the trace says, however little",
    "followed_shuffled": "the same, with the traces shuffled",
    "followed_more": "the difference of these two",
    "twice": "one problem is named twice",
    "unmoved": "a problem is named, and the box stays all the same",
    "kept": "the trace says to keep the box, and it stays",
}


def traces_told(rollouts: list[Rollout], resampling: Resampling) -> dict[str, Any]:
    """Return how far the traces of a student's refinements hold: {key of `TOLD`: cell}, shares, n in traces.

    All but "kept" are shares of the traces that name a problem. Shuffled: every trace meets the box of every such trace
    in turn, which is the share that words without regard to their box would reach. ValueError where no two steps in a
    row have a box.
    """
    images, named, wrong, moved, fits = zip(
        *(
            (
                rollout["image_id"],
                re.findall("|".join(protocol.PROBLEMS), step["text"]),
                ways(shown["box"], rollout["truth"]),
                ways(shown["box"], step["box"]),
                protocol.TRACE_FITS in step["text"],
            )
            for rollout in rollouts
            for shown, step in pairwise(rollout["steps"])
            if shown["box"] and step["box"]
        ),
        strict=True,
    )
    names, stays = np.array([bool(words) for words in named]), np.array([not found for found in moved])
    scores = {"twice": [len({*words}) < len(words) for words in named], "unmoved": stays, "kept": stays}
    share = names / max(1, names.sum())
    for kind, problems_of in (("true", wrong), ("followed", moved)):
        holds = np.array([[bool(words) and words[0] in found for words in named] for found in problems_of], float)
        # What a trace and a box each add to the mean, less the mean: so its interval covers the draw of both.
        shuffled = np.round(share @ holds + holds @ share - share @ holds @ share, 9)
        true = holds.diagonal()
        scores |= {kind: true, f"{kind}_shuffled": shuffled, f"{kind}_more": true - shuffled}
    asked = [np.array(fits) & ~names if kind == "kept" else names for kind in TOLD]
    counted = [scores[kind] * where for kind, where in zip(TOLD, asked, strict=True)]
    return dict(zip(TOLD, metrics.intervals(counted, asked, images, resampling), strict=True))


def says_and_does(rollouts: list[Rollout], resampling: Resampling) -> dict[str, Any]:
    """Return cells of the last step: its trace "says" that the box fits; the box "does" stay; their "difference"."""
    boxes = [[step["box"] for step in rollout["steps"][-2:]] for rollout in rollouts]
    says = [protocol.TRACE_FITS in rollout["steps"][-1]["text"] for rollout in rollouts]
    does = [last is not None and before is not None and list(before) == list(last) for before, last in boxes]
    images = [rollout["image_id"] for rollout in rollouts]
    more = [a - b for a, b in zip(says, does, strict=True)]
    cells = metrics.intervals([says, does, more], [[1] * len(does)] * 3, images, resampling)
    return dict(zip(("says", "does", "difference"), cells, strict=True))


def ways(box, other) -> set[str]:
    """Return in which ways a box differs from another, however little: words of `protocol.PROBLEMS`; both 0..1000."""
    words = list(protocol.PROBLEMS)  # in pairs: where the center lies, then the size
    sizes = [(b[0] + b[2], b[1] + b[3], b[2] - b[0], b[3] - b[1]) for b in (box, other)]
    return {words[2 * i + (a > b)] for i, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b}
