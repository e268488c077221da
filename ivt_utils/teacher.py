"""The teacher: one short corrective trace a step, from the boxes alone.

The paper's teacher is a VLM. Ours reads the geometry, so that every trace can be checked against the boxes. A VLM
teacher is any function with the signature of `geometric_trace`.
"""

from ivt_utils import protocol
from ivt_utils.profiles import MOST_PROBLEMS, TEACHER_TOLERANCE


def problems(box, truth, most: int = MOST_PROBLEMS) -> list[str]:
    """Return what is wrong with `box`, worst first: words of `protocol.PROBLEMS`, at most `most` of them.

    Offsets of the center and differences of size count relative to the truth's width and height (all 0..1000). The
    largest error is named however small it is, others above `TEACHER_TOLERANCE`; only the truth itself has no error.
    """
    ranked = _errors(box, truth)
    return [word for i, (word, error) in enumerate(ranked[:most]) if error > (TEACHER_TOLERANCE if i else 0)]


def within_tolerance(box, truth) -> bool:
    """Return whether no error of `box` is above `TEACHER_TOLERANCE`."""
    return _errors(box, truth)[0][1] <= TEACHER_TOLERANCE


def _errors(box, truth) -> list[tuple[str, float]]:
    width, height = truth[2] - truth[0], truth[3] - truth[1]
    errors = {
        ("too far left", "too far right"): (truth[0] - box[0] + truth[2] - box[2]) / 2 / width,
        ("too high", "too low"): (truth[1] - box[1] + truth[3] - box[3]) / 2 / height,
        ("too narrow", "too wide"): (width - (box[2] - box[0])) / width,
        ("too short", "too tall"): (height - (box[3] - box[1])) / height,
    }
    pairs = [(words[error < 0], abs(error)) for words, error in errors.items()]
    return sorted(pairs, key=lambda pair: -pair[1])


def geometric_trace(box, truth) -> str:
    """Return the trace that corrects `box` towards `truth`, such as "It is too high: move down."."""
    wrong = problems(box, truth)
    if not wrong:
        return protocol.TRACE_FITS
    return f"{protocol.TRACE_OPENS} {' and '.join(wrong)}: {' and '.join(protocol.PROBLEMS[word] for word in wrong)}."
