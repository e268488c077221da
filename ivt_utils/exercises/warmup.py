"""The exercises of notebook 3: what the loss grades, what LoRA adds, what is wrong with a box, and what an oracle gains."""

import numpy as np

from ivt_utils.exercises import Exercise
from ivt_utils.protocol import PROBLEMS


def my_labels(ids, assistant):
    """Return the labels of a chat, one for each token id: the id where `assistant` is 1, -100 where it is 0."""
    return [token if graded else -100 for token, graded in zip(ids, assistant)]


def my_lora(x, W, A, B, alpha, rank):
    """Return the output (n, d_out) of a frozen linear layer W with a LoRA adapter.

    x: (n, d_in), W: (d_out, d_in), A: (rank, d_in), B: (d_out, rank), NumPy arrays; alpha and rank: numbers.
    """
    frozen = x @ W.T
    adapter = x @ A.T @ B.T
    return frozen + alpha / rank * adapter


def my_has_problem(problem, box, other):
    """Return whether `box` has `problem`, such as "too far left", seen from the box `other`; both are 0..1000."""
    left, top, right, bottom = (a - b for a, b in zip(box, other))
    x, y, width, height = left + right, top + bottom, right - left, bottom - top
    errors = {"too far left": -x, "too far right": x, "too high": -y, "too low": y}
    errors |= {"too narrow": -width, "too wide": width, "too short": -height, "too tall": height}
    return errors[problem] > 0


def my_oracle(ious, threshold):
    """Return (accuracy of the final step, accuracy of the oracle's best step), shares from 0 to 1.

    ious: NumPy array (samples, steps), step 0 first. An answer is right when its IoU is at least `threshold`.
    """
    final = ious[:, -1] >= threshold
    oracle = ious.max(axis=1) >= threshold
    return final.mean(), oracle.mean()


# ------------------------------------------------------------------------------------------------ random arguments
def _chat(rng):
    """Return token ids and a mask of 0 and 1: question, then one to three answers with feedback between them."""
    mask = [0] * rng.randint(1, 4)
    for turn in range(rng.randint(1, 3)):
        mask += [0] * rng.randint(1, 3) * (turn > 0) + [1] * rng.randint(1, 4)
    mask += [0] * rng.randint(0, 1)
    return [rng.choice([0, 1, rng.randrange(2, 250)]) for _ in mask], mask


def _layer(rng):
    """Return a small layer, sometimes square, sometimes with B = 0 as before training."""
    n, d_in, d_out, rank = rng.randint(1, 3), rng.randint(2, 5), rng.randint(2, 5), rng.randint(1, 4)
    draw = np.random.default_rng(rng.randrange(2**32)).normal
    B = draw(size=(d_out, rank)) * rng.choice([0, 1, 1, 1])
    x, W, A = draw(size=(n, d_in)), draw(size=(d_out, d_in)), draw(size=(rank, d_in))
    return x, W, A, B, rng.choice([1, 2, 8, 16, rank]), rank


def _two_boxes(rng):
    """Return a problem and two boxes of whole tens, apart in their center and size, in some of that, or in nothing."""
    x, y, width, height = (10 * rng.randint(10, 30) for _ in range(4))
    dx, dy, wider, taller = (10 * rng.choice([-4, -1, 0, 0, 1, 4]) for _ in range(4))
    other = x, y, x + width, y + height
    box = x + dx - wider, y + dy - taller, x + dx + width + wider, y + dy + height + taller
    return rng.choice(list(PROBLEMS)), box, other


def _matrix(rng):
    """Return the IoUs of up to eight samples over two to four steps, many exactly at a threshold, and the threshold."""
    threshold = rng.choice([0.5, 0.7, 0.9])
    kinds = [0.0, threshold, round(threshold - 0.01, 2), round(threshold + 0.01, 2), round(rng.random(), 2)]
    shape = rng.randint(1, 8), rng.randint(2, 4)
    return np.array([rng.choices(kinds, k=shape[1]) for _ in range(shape[0])]), threshold


# ------------------------------------------------------------------------------------------------ known mistakes
def _answers(assistant) -> list[int]:
    """Return for each token the number of its answer, from 1; 0 for a token that is given."""
    number, numbers = 0, []
    for before, graded in zip([0, *assistant], assistant):
        number += graded and not before
        numbers.append(number if graded else 0)
    return numbers


def _last_answer(ids, assistant):
    numbers = _answers(assistant)
    return my_labels(ids, [number and number == max(numbers) for number in numbers])


def _but_step_0(ids, assistant):
    return my_labels(ids, [number > 1 for number in _answers(assistant)])


def _shifted(ids, assistant):
    return [*my_labels(ids, assistant)[1:], -100]


def _seen(problem, errors) -> bool:
    """Return whether a problem is there, from the errors to the right, downwards, in width and in height."""
    words = list(PROBLEMS)  # in pairs: too little, too much
    error = errors[words.index(problem) // 2]
    return error > 0 if words.index(problem) % 2 else error < 0


def _of_corner(problem, box, other):
    x, y, width, height = (b - a for a, b in zip(other, box))
    return _seen(problem, (x, y, width - x, height - y))


def _upside_down(problem, box, other):
    flipped = {"too high": "too low", "too low": "too high"}
    return my_has_problem(flipped.get(problem, problem), box, other)


def _turned(problem, box, other):
    turned = {"too wide": "too tall", "too tall": "too wide", "too narrow": "too short", "too short": "too narrow"}
    return my_has_problem(turned.get(problem, problem), box, other)


def _not_smaller(problem, box, other):
    words = list(PROBLEMS)
    return not my_has_problem(words[words.index(problem) ^ 1], box, other)


EXERCISES = (
    Exercise(
        title="what the loss grades",
        minutes=3,
        task="""
            A trajectory is one long row of token ids, but the loss grades the assistant's tokens only: those of every
            answer, step 0 included. `assistant` holds a 1 for each token that the assistant wrote and a 0 for each that
            it was given. Return the **labels**, a list as long as `ids`: the id itself where it is graded, else -100,
            which PyTorch's cross-entropy leaves out. Do not shift the labels: the model itself compares each one with
            what it predicted at the token before.
        """,
        hints=(
            "`zip` walks over both lists at once.",
            "For each pair of a token and its mask, put the token into the list if the mask is 1, and -100 if it is 0.",
            """One list comprehension over `zip(ids, assistant)` will do; its first part is
            `token if graded else -100`.""",
        ),
        solution=my_labels,
        inputs=_chat,
        mistakes={
            "You grade what the student was given and leave out what it wrote.": lambda ids, mask: my_labels(
                ids, [1 - v for v in mask]
            ),
            "You put 0 where nothing is graded, but 0 is a token; -100 is the label that the loss leaves out.": lambda ids, mask: [
                token * graded for token, graded in zip(ids, mask)
            ],
            "You leave out the tokens that are not graded, so that labels and ids no longer stand side by side.": lambda ids, mask: [
                token for token, graded in zip(ids, mask) if graded
            ],
            "You shift the labels; the model does that by itself.": _shifted,
            "You grade the last answer only; every answer is graded.": _last_answer,
            "You leave out step 0; every answer is graded.": _but_step_0,
            "You grade every token, the question and the feedback as well.": lambda ids, mask: ids,
        },
    ),
    Exercise(
        title="a layer with a LoRA adapter",
        minutes=6,
        task="""
            SFT does not touch the student's weights: beside each frozen weight `W` it learns two thin matrices, `A` and
            `B`. Return the output of such a layer, x Wᵀ + (alpha / rank) x Aᵀ Bᵀ, as a NumPy array of shape (n, d_out).
            `alpha` is a fixed number that says how much the adapter counts. `x` is (n, d_in), `W` (d_out, d_in), `A`
            (rank, d_in), `B` (d_out, rank). Before training `B` is all zeros, so that a fresh adapter changes nothing.
            (Exercises 1 and 2 are only checked here: in the training TRL and PEFT do this.)
        """,
        hints=(
            "`@` multiplies two matrices, `.T` transposes one. Which shapes fit together?",
            """Two ways lead from x to the output. The frozen one multiplies by W transposed. The other goes down to
            `rank` numbers with A transposed, then up again with B transposed. Scale the second one and add both.""",
            """The frozen way is `x @ W.T`. The adapter is `x @ A.T`, of shape (n, rank), and then `@ B.T`, of shape
            (n, d_out). Multiply the adapter by `alpha / rank` before you add it.""",
        ),
        solution=my_lora,
        inputs=_layer,
        mistakes={
            "You leave out the frozen layer; the adapter is added to it.": lambda x, W, A, B, alpha, rank: (
                alpha / rank * (x @ A.T @ B.T)
            ),
            "You do not scale the adapter; it counts alpha / rank times.": lambda x, W, A, B, alpha, rank: (
                x @ W.T + x @ A.T @ B.T
            ),
            "You scale the adapter by alpha and do not divide by the rank.": lambda x, W, A, B, alpha, rank: (
                x @ W.T + alpha * (x @ A.T @ B.T)
            ),
            "You scale the adapter by rank / alpha; it is alpha / rank.": lambda x, W, A, B, alpha, rank: (
                x @ W.T + rank / alpha * (x @ A.T @ B.T)
            ),
            "You scale the frozen layer as well; only the adapter is scaled.": lambda x, W, A, B, alpha, rank: (
                alpha / rank * (x @ W.T + x @ A.T @ B.T)
            ),
            "You do not transpose W: its shape is (d_out, d_in).": lambda x, W, A, B, alpha, rank: (
                x @ W + alpha / rank * (x @ A.T @ B.T)
            ),
            "You multiply by A and B without transposing them.": lambda x, W, A, B, alpha, rank: (
                x @ W.T + alpha / rank * (x @ A @ B)
            ),
        },
    ),
    Exercise(
        title="does the box have this problem?",
        minutes=5,
        task="""
            A trace names a problem of the box shown: that it is "too far left", "too far right", "too high", "too low",
            "too narrow", "too wide", "too short" or "too tall". Return `True` if `box` has this `problem` when it is
            compared with the box `other`, and else `False`. Both boxes are (left, top, right, bottom) in 0..1000, where
            top is a smaller number than bottom. The first four problems are about the center of the box, the others
            about its width and height. Every difference counts, however small.
        """,
        hints=(
            "Take a pencil: which of its four numbers say where the center of a box lies, and which how wide it is?",
            """The center lies further right when left + right is larger, and lower when top + bottom is larger. A box
            is wider when right - left is larger. Compute these differences between the two boxes first, then choose.""",
            """Put them into a dictionary: `errors = {"too far right": (box[0] + box[2]) - (other[0] + other[2]), ...}`,
            and for the opposite problem the same difference with its sign turned. Then `return errors[problem] > 0`.""",
        ),
        solution=my_has_problem,
        inputs=_two_boxes,
        mistakes={
            "You have it the wrong way round: you return whether `other` has the problem.": lambda problem, box, other: (
                my_has_problem(problem, other, box)
            ),
            "You turn high and low around; in an image, the numbers grow downwards.": _upside_down,
            "You compare the left and top edges; these problems are about the center of the box.": _of_corner,
            "You take width for height.": _turned,
            "You also say yes where there is no difference at all.": _not_smaller,
            "You only say whether the two boxes differ; the direction counts.": lambda problem, box, other: (
                box != other
            ),
        },
    ),
    Exercise(
        title="the final step and the oracle",
        minutes=5,
        task="""
            The paper's best number is an **oracle**: for each sample it takes the best step, chosen with the ground
            truth. Nobody can do that without the truth; what a user gets is the final step. Return both accuracies as
            `(final, oracle)`, shares from 0 to 1 of the samples whose IoU is at least `threshold`. `ious` is a NumPy
            array of shape (samples, steps). The final step is one of the steps that the oracle chooses from, so the
            oracle's number is never below it.
        """,
        hints=(
            "The final step is the last column, `ious[:, -1]`. The best step differs from sample to sample.",
            """The oracle's IoU of a sample is the largest number in its row. Compare it, and the last column, with the
            threshold (`>=`). The mean of the trues and falses is the accuracy.""",
            """`ious.max(axis=1)` gives the largest IoU of each row, as many numbers as there are samples. Return
            `(ious[:, -1] >= threshold).mean()` and the same of those largest IoUs.""",
        ),
        solution=my_oracle,
        inputs=_matrix,
        mistakes={
            "You leave out an IoU that is exactly the threshold; it counts as right.": lambda ious, limit: (
                (ious[:, -1] > limit).mean(),
                (ious.max(1) > limit).mean(),
            ),
            "You leave step 0 out; the oracle may choose it as well.": lambda ious, limit: (
                (ious[:, -1] >= limit).mean(),
                (ious[:, 1:].max(1) >= limit).mean(),
            ),
            "You take step 0, the first column, for the final step.": lambda ious, limit: (
                (ious[:, 0] >= limit).mean(),
                (ious.max(1) >= limit).mean(),
            ),
            "You take the best sample of each step (`axis=0`); the oracle takes the best step of each sample.": lambda ious, limit: (
                (ious[:, -1] >= limit).mean(),
                (ious.max(0) >= limit).mean(),
            ),
            "Your oracle takes one step for all samples; it chooses for each sample anew.": lambda ious, limit: (
                (ious[:, -1] >= limit).mean(),
                (ious >= limit).mean(0).max(),
            ),
            "You return the oracle first; the order is (final, oracle).": lambda ious, limit: my_oracle(ious, limit)[
                ::-1
            ],
            "You count the right samples; divide by the number of samples.": lambda ious, limit: (
                (ious[:, -1] >= limit).sum(),
                (ious.max(1) >= limit).sum(),
            ),
            "You return mean IoUs; an accuracy is the share of samples that reach the threshold.": lambda ious, limit: (
                ious[:, -1].mean(),
                ious.max(1).mean(),
            ),
        },
    ),
)
