"""The teacher: one short corrective trace a step, from the boxes alone.

The paper's teacher is a VLM. Ours reads the geometry, so that every trace can be checked against the boxes. A VLM
teacher is any function with the signature of `geometric_trace`.
"""

from ivt_utils import protocol

TOLERANCE = 0.1  # of the truth's width or height: a smaller error is not worth a word
MOST_PROBLEMS = 2


def problems(box, truth, most: int = MOST_PROBLEMS) -> list[str]:
    """Return what is wrong with `box`, worst first: words of `protocol.PROBLEMS`, at most `most` of them.

    Offsets of the centre and differences of size count relative to the truth's width and height (all 0..1000).
    """
    width, height = truth[2] - truth[0], truth[3] - truth[1]
    errors = {
        ("too far left", "too far right"): (truth[0] + truth[2] - box[0] - box[2]) / 2 / width,
        ("too high", "too low"): (truth[1] + truth[3] - box[1] - box[3]) / 2 / height,
        ("too narrow", "too wide"): (width - (box[2] - box[0])) / width,
        ("too short", "too tall"): (height - (box[3] - box[1])) / height,
    }
    ranked = sorted(errors.items(), key=lambda pair: -abs(pair[1]))
    return [words[error < 0] for words, error in ranked[:most] if abs(error) > TOLERANCE]


def geometric_trace(box, truth) -> str:
    """Return the trace that corrects `box` towards `truth`, such as "It is too high: move down."."""
    wrong = problems(box, truth)
    if not wrong:
        return protocol.TRACE_FITS
    return f"{protocol.TRACE_OPENS} {' and '.join(wrong)}: {' and '.join(protocol.PROBLEMS[word] for word in wrong)}."
