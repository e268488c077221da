"""The exercises of notebook 5: paired differences, resampling by image, and an interval."""

import numpy as np

from ivt_utils.exercises import Exercise


def my_paired_difference(a, b):
    """Return (difference, margin): the mean of a's score minus b's, and half the width of its 95% interval.

    a, b: dictionaries of the same ids, id -> score of one sample under each of the two methods.
    """
    gains = [a[name] - b[name] for name in a]
    return np.mean(gains), 1.96 * np.std(gains) / len(gains) ** 0.5


def my_resampled_mean(scores, image_ids, drawn):
    """Return the mean score of one resample, a number.

    scores: one score a sample. image_ids: the image of each sample, as many.
    drawn: the images of the resample, drawn with replacement: an image may stand there more than once.
    """
    taken = []
    for image in drawn:
        taken += [score for score, image_id in zip(scores, image_ids) if image_id == image]
    return sum(taken) / len(taken)


def my_interval(scores, resamples):
    """Return (low, high), the 95% bootstrap interval of the mean score.

    scores: one score a sample.
    resamples: lists of positions in `scores`, drawn with replacement, each as long as `scores`.
    """
    means = [np.mean([scores[i] for i in resample]) for resample in resamples]
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


# ------------------------------------------------------------------------------------------------ random inputs
def _two_methods(rng):
    """Return the scores of two methods by id, the ids in different orders; sometimes b is better by a constant."""
    names = [f"s{i}" for i in range(rng.randint(2, 6))]
    a = {name: round(rng.random(), 2) for name in names}
    constant = rng.random() < 0.2
    b = {name: round(a[name] + 0.05 if constant else rng.random(), 2) for name in rng.sample(names, len(names))}
    return a, b


def _images(rng):
    """Return scores, their images (one to three samples each, in any order), and as many drawn images."""
    names = ["cat", "dog", "car", "bus", "cup"][: rng.randint(2, 5)]
    ids = [name for name in names for _ in range(rng.randint(1, 3))]
    ids = rng.sample(ids, len(ids))
    return [round(rng.random(), 2) for _ in ids], ids, rng.choices(names, k=len(names))


def _resamples(rng):
    count = rng.randint(2, 6)
    scores = [round(rng.random(), 2) for _ in range(count)]
    scores = scores if rng.random() < 0.9 else scores[:1] * count  # all equal: an interval without width
    return scores, [rng.choices(range(count), k=count) for _ in range(rng.randint(41, 60))]


# ------------------------------------------------------------------------------------------------ usual mistakes
def _difference(a, b):
    return np.mean([*a.values()]) - np.mean([*b.values()])


def _spread(a, b, ddof=0):
    return np.std([a[name] - b[name] for name in a], ddof=ddof)


def _by_position(a, b):
    return my_paired_difference(dict(enumerate(a.values())), dict(enumerate(b.values())))


def _unpaired(a, b):
    return _difference(a, b), 1.96 * ((np.var([*a.values()]) + np.var([*b.values()])) / len(a)) ** 0.5


def _of_image(scores, image_ids, image):
    return [score for score, its in zip(scores, image_ids) if its == image]


def _means(scores, resamples):
    return [np.mean([scores[i] for i in resample]) for resample in resamples]


def _ends(values, low=2.5, high=97.5):
    return np.percentile(values, low), np.percentile(values, high)


def _normal(scores, resamples, shrink):
    means = _means(scores, resamples)
    margin = 1.96 * np.std(means) / (len(means) ** 0.5 if shrink else 1)
    return np.mean(means) - margin, np.mean(means) + margin


EXERCISES = (
    Exercise(
        title="a paired difference",
        minutes=6,
        task="""
            Two methods answered the same samples. Pair them **by id**: the two dictionaries hold the same ids, but
            not in the same order. Take a's score minus b's for each sample, and return two numbers: the mean of these
            differences, and the margin of the 95% interval around it. The margin is 1.96 times `np.std` of the
            differences, divided by the square root of their number. The mean would be the same without pairing. The
            margin would not: what is easy or hard for both methods cancels only within a pair.
        """,
        hints=(
            "Everything follows from one list: the difference of each sample. Go through the ids, not through the "
            "values.",
            "`a[name] - b[name]` for every `name` in `a`. Then the mean of that list, and 1.96 x standard deviation "
            "/ square root of the number of samples.",
            "`gains = [a[name] - b[name] for name in a]`, then `np.mean(gains)` and `1.96 * np.std(gains) / "
            "len(gains) ** 0.5`.",
        ),
        solution=my_paired_difference,
        inputs=_two_methods,
        imports="import numpy as np",
        mistakes={
            "You return the limits of the interval; return the mean difference and the margin.": lambda a, b: (
                _difference(a, b) - 1.96 * _spread(a, b) / len(a) ** 0.5,
                _difference(a, b) + 1.96 * _spread(a, b) / len(a) ** 0.5,
            ),
            "You pair by position and not by id: the mean is right all the same, the margin is not.": _by_position,
            "You take the spreads of the two methods apart: that margin is the one of unpaired samples.": _unpaired,
            "You take b minus a; the difference is a minus b.": lambda a, b: my_paired_difference(b, a),
            "You give the spread of single samples: divide by the square root of their number.": lambda a, b: (
                _difference(a, b),
                1.96 * _spread(a, b),
            ),
            "You divide by the number of samples; divide by its square root.": lambda a, b: (
                _difference(a, b),
                1.96 * _spread(a, b) / len(a),
            ),
            "You give the standard error: the margin of a 95% interval is 1.96 times as wide.": lambda a, b: (
                _difference(a, b),
                _spread(a, b) / len(a) ** 0.5,
            ),
            "You give the whole width of the interval; the margin is half of it.": lambda a, b: (
                _difference(a, b),
                2 * 1.96 * _spread(a, b) / len(a) ** 0.5,
            ),
            "You divide by n - 1 inside the standard deviation, a sound choice; here take `np.std` as it is.": lambda a, b: (
                _difference(a, b),
                1.96 * _spread(a, b, ddof=1) / len(a) ** 0.5,
            ),
            "You take the size of each difference without its sign: losses then count as gains.": lambda a, b: (
                my_paired_difference({k: abs(a[k] - b[k]) for k in a}, dict.fromkeys(a, 0.0))
            ),
        },
    ),
    Exercise(
        title="one resample, drawn by image",
        minutes=5,
        task="""
            The **bootstrap** asks how a mean would vary with other test data: draw the data again from themselves,
            with replacement, and look. Two expressions about one image are not independent, so whole **images** are
            drawn, each with all its samples. You get the images of one such draw. Return the mean over all samples of
            the drawn images. An image that is drawn twice counts twice, and an image with three samples brings three
            scores each time.
        """,
        hints=(
            "Start from `drawn`, not from `scores`: each item there brings its samples with it, as often as it "
            "stands there.",
            "Collect scores in one list: for each drawn image, those of all samples with this image. Divide their "
            "sum by their number, which differs from draw to draw.",
            "For each `image` in `drawn`, add `[score for score, image_id in zip(scores, image_ids) if image_id == "
            "image]` to a list `taken`; then `sum(taken) / len(taken)`.",
        ),
        solution=my_resampled_mean,
        inputs=_images,
        mistakes={
            "You count an image that is drawn twice only once.": lambda scores, image_ids, drawn: np.mean(
                [score for score, its in zip(scores, image_ids) if its in drawn]
            ),
            "You average the means of the images: an image with more samples must weigh more.": lambda scores, image_ids, drawn: (
                np.mean([np.mean(_of_image(scores, image_ids, i)) for i in drawn])
            ),
            "You take the mean of all samples, whatever was drawn.": lambda scores, image_ids, drawn: np.mean(scores),
            "You keep only the last sample of an image: a dictionary holds one value for each key.": lambda scores, image_ids, drawn: (
                np.mean([_of_image(scores, image_ids, i)[-1] for i in drawn])
            ),
            "You take only the first sample of an image; all its samples come with it.": lambda scores, image_ids, drawn: (
                np.mean([_of_image(scores, image_ids, i)[0] for i in drawn])
            ),
            "You divide by the number of drawn images; divide by the number of samples that came with them.": lambda scores, image_ids, drawn: (
                sum(sum(_of_image(scores, image_ids, i)) for i in drawn) / len(drawn)
            ),
            "You divide by the number of all samples; a draw may bring more of them or fewer.": lambda scores, image_ids, drawn: (
                sum(sum(_of_image(scores, image_ids, i)) for i in drawn) / len(scores)
            ),
            "You give the sum of the scores; give their mean.": lambda scores, image_ids, drawn: sum(
                sum(_of_image(scores, image_ids, i)) for i in drawn
            ),
        },
    ),
    Exercise(
        title="a bootstrap interval",
        minutes=5,
        task="""
            Now from many resamples to an interval. Each resample is a list of positions in `scores`, with repeats.
            Take the mean score of each resample. The 95% interval reaches from the 2.5th to the 97.5th **percentile**
            of these means: 2.5% of them lie below it and 2.5% above it. If it does not hold 0, the figure of this
            notebook draws it in blue. Return (low, high), both from `np.percentile` as it is.
        """,
        hints=(
            "Two stages: from each resample to one mean, then from all the means to two percentiles.",
            "The mean of `[scores[i] for i in resample]` for every resample. `np.percentile` wants a list and a "
            "number from 0 to 100.",
            "`means = [np.mean([scores[i] for i in resample]) for resample in resamples]`, then "
            "`np.percentile(means, 2.5)` and the same with 97.5.",
        ),
        solution=my_interval,
        inputs=_resamples,
        imports="import numpy as np",
        mistakes={
            "You give the smallest and the largest mean: that range grows with every further resample.": lambda scores, resamples: (
                min(_means(scores, resamples)),
                max(_means(scores, resamples)),
            ),
            "You cut off 5% on each side: that is a 90% interval.": lambda scores, resamples: _ends(
                _means(scores, resamples), 5, 95
            ),
            "You give `np.percentile` shares; it counts from 0 to 100, so 2.5 and 97.5.": lambda scores, resamples: (
                _ends(_means(scores, resamples), 0.025, 0.975)
            ),
            "You take percentiles of the scores themselves: that is where samples lie, not where their mean lies.": lambda scores, resamples: (
                _ends(scores)
            ),
            "You throw all resamples together before you take percentiles; take the mean of each one first.": lambda scores, resamples: (
                _ends([scores[i] for resample in resamples for i in resample])
            ),
            "You take the median of each resample; the interval is one of the mean.": lambda scores, resamples: _ends(
                [np.median([scores[i] for i in r]) for r in resamples]
            ),
            "You average the positions; look up the score that stands at each of them.": lambda scores, resamples: (
                _ends([np.mean(resample) for resample in resamples])
            ),
            "You return (high, low); the lower limit comes first.": lambda scores, resamples: _ends(
                _means(scores, resamples)
            )[::-1],
            "You take 1.96 standard deviations around the mean, which supposes a normal curve; take percentiles.": lambda scores, resamples: (
                _normal(scores, resamples, shrink=False)
            ),
            "You divide by the square root of the number of resamples: more resamples would mean more certainty.": lambda scores, resamples: (
                _normal(scores, resamples, shrink=True)
            ),
        },
    ),
)
