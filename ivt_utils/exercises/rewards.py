"""The exercises of notebook 4: what a rollout earns, what a group of them teaches, and how far the policy has moved."""

import numpy as np

from ivt_utils.exercises import Exercise


def my_reward(ious, bonus):
    """Return the reward of one rollout, a number.

    ious: for each answer in the order of the steps its IoU with the truth, 0 to 1, or None if it did not parse.
    bonus: what is added when every answer parses (the paper: 0.1).
    """
    final = 0.0 if ious[-1] is None else ious[-1]
    return final if None in ious else final + bonus


def my_advantages(rewards, spread):
    """Return the advantages of one group, a list as long as `rewards`.

    rewards: the rewards of all rollouts of one prompt.
    spread: the standard deviation of the rewards of the whole batch, in the same units.
    """
    mean = sum(rewards) / len(rewards)
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def my_kl(policy, reference, own):
    """Return the estimated KL divergence of the policy from the reference, in nats a token, 0.0 or more.

    policy, reference: arrays of the log-probability of each token under the two models, in nats.
    own: an array of booleans as long, True for a token that the student wrote, False for one of the feedback.
    """
    gap = (reference - policy)[own]
    return (np.exp(gap) - gap - 1).mean()


# ------------------------------------------------------------------------------------------------ random inputs
def _ious(rng):
    """Return the IoUs of one to four answers, often None or exactly 0."""
    return [rng.choice([None, 0.0, *(round(rng.random(), 2) for _ in range(4))]) for _ in range(rng.randint(1, 4))]


def _group(rng, size):
    """Return the rewards of a group: often all equal, sometimes but for a hair or for the computer's last digit."""
    equal = rng.choice([[0.1] * size, [round(rng.random(), 2)] * size, [0.3] + [0.1 + 0.2] * (size - 1)])
    free = [round(1.1 * rng.random(), 2) for _ in range(size)]
    twins = free[:-1] + free[:1]  # the first and the last are equal
    hair = [0.5] * (size - 1) + [0.51]
    return rng.choice([equal, free, twins, hair])


def _group_and_spread(rng):
    group = _group(rng, rng.randint(2, 6))
    batch = group if rng.random() < 0.4 else group + _group(rng, 6)
    return group, round(float(np.std(batch)), 4)


def _tokens(rng):
    count = rng.randint(3, 8)
    policy = [round(-3 * rng.random(), 2) for _ in range(count)]
    moved = rng.random() < 0.8  # a policy that has not moved has a KL of 0
    reference = [round(p - rng.uniform(-1, 1), 2) if moved else p for p in policy]
    own = rng.sample([True, False] + rng.choices([True, False], k=count - 2), count)
    own = own if rng.random() < 0.8 else [True] * count
    return np.array(policy), np.array(reference), np.array(own)


# ------------------------------------------------------------------------------------------------ usual mistakes
def _zero(iou):
    return iou or 0.0


def _earned(ious, bonus):
    return 0.0 if None in ious else bonus


def _minus_mean(rewards):
    return [reward - sum(rewards) / len(rewards) for reward in rewards]


def _k3(gap):
    return np.exp(gap) - gap - 1


EXERCISES = (
    Exercise(
        title="the reward of a rollout",
        minutes=4,
        task="""
            One rollout is one try of the student: its first answer and the refinements after it. GRPO sees a rollout
            only through one number, the reward, so whatever the reward leaves out is not learned. Write it as the
            paper has it: the IoU of the **final** answer, plus `bonus` when **every** answer of the rollout parses
            (holds one valid box). An answer that does not parse stands in the list as `None`; as the final answer it
            counts as an IoU of 0. An IoU of exactly 0.0 did parse: its box misses the thing.
        """,
        hints=(
            "Two questions, answered apart: what is `ious[-1]` worth, and does `ious` hold a `None` anywhere?",
            "The final IoU counts 0 where it is `None`. To it comes the bonus, but only when no item is `None`. Ask "
            "with `is None` or `in`: `if iou` is also false for 0.0.",
            "`final = 0.0 if ious[-1] is None else ious[-1]`, then return `final` or `final + bonus`, depending on "
            "`None in ious`.",
        ),
        solution=my_reward,
        inputs=lambda rng: (_ious(rng), rng.choice([0.1, 0.2, 0.5])),
        mistakes={
            "You give nothing when an earlier answer does not parse; the final IoU still counts.": lambda ious, bonus: (
                0.0 if None in ious else ious[-1] + bonus
            ),
            "You reward the best step, which only an oracle knows; the final answer counts.": lambda ious, bonus: (
                max(map(_zero, ious)) + _earned(ious, bonus)
            ),
            "You reward the first answer; the loop is judged by its final one.": lambda ious, bonus: (
                _zero(ious[0]) + _earned(ious, bonus)
            ),
            "You reward the mean over the steps; only the final answer counts.": lambda ious, bonus: (
                sum(map(_zero, ious)) / len(ious) + _earned(ious, bonus)
            ),
            "You give the bonus although an answer does not parse.": lambda ious, bonus: _zero(ious[-1]) + bonus,
            "You give the bonus for the form of the final answer alone; every answer must parse.": lambda ious, bonus: (
                _zero(ious[-1]) + bonus * (ious[-1] is not None)
            ),
            "You give a part of the bonus for each answer that parses; it is for all of them or none.": lambda ious, bonus: (
                _zero(ious[-1]) + bonus * sum(iou is not None for iou in ious) / len(ious)
            ),
            "You forget the bonus.": lambda ious, bonus: _zero(ious[-1]),
            "You take an IoU of 0.0 for an answer that does not parse: both are false to `if` and `all`.": lambda ious, bonus: (
                _zero(ious[-1]) + bonus * all(ious)
            ),
            "You go back to an earlier answer when the final one does not parse; its IoU is 0 then.": lambda ious, bonus: (
                next((iou for iou in ious[::-1] if iou is not None), 0.0) + _earned(ious, bonus)
            ),
            "You add to `None`: a final answer that does not parse needs an IoU of 0.": lambda ious, bonus: (
                ious[-1] + _earned(ious, bonus)
            ),
        },
    ),
    Exercise(
        title="advantages of a group",
        minutes=4,
        task="""
            A reward alone does not say whether a rollout was good: 0.6 is much for a hard prompt and little for an
            easy one. GRPO compares it with the other rollouts of the same prompt, its **group**: the **advantage** is
            the reward minus the mean of the group, divided by a spread. Rollouts with a positive advantage become
            more likely, the others less. The spread is given here: it is that of the whole batch, not of the group.
            Add 0.0001 to it before you divide, as TRL does. When all rewards of a group are equal, every advantage is
            then 0, even where the spread is 0 as well.
        """,
        hints=(
            "The mean is that of `rewards`. The spread is an argument: nothing to compute.",
            "For each reward: take off the mean, then divide the difference by (spread + 0.0001). Brackets matter "
            "twice.",
            "With `mean = sum(rewards) / len(rewards)`, return the list of `(reward - mean) / (spread + 1e-4)` for "
            "each `reward`.",
        ),
        solution=my_advantages,
        inputs=_group_and_spread,
        mistakes={
            "You divide by the spread alone, and NumPy gives nan where it is 0: add 0.0001 to it first.": lambda rewards, spread: (
                np.array(_minus_mean(rewards)) / np.float64(spread)
            ),
            "You do not take off the mean of the group: every reward above 0 would be made more likely.": lambda rewards, spread: [
                reward / (spread + 1e-4) for reward in rewards
            ],
            "You do not divide by the spread.": lambda rewards, spread: _minus_mean(rewards),
            "You divide by the group's own spread: rewards that differ by a hair are blown up to full size.": lambda rewards, spread: [
                v / (np.std(rewards) + 1e-4) for v in _minus_mean(rewards)
            ],
            "You divide by the group's own spread (with n - 1); take the one of the batch, which is given.": lambda rewards, spread: [
                v / (np.std(rewards, ddof=1) + 1e-4) for v in _minus_mean(rewards)
            ],
            "You divide by the spread alone, which may be 0: add 0.0001 to it first.": lambda rewards, spread: [
                v / spread for v in _minus_mean(rewards)
            ],
            "You leave out the 0.0001 and treat a spread of 0 on its own; add it to every spread.": lambda rewards, spread: [
                v / spread if spread else 0.0 for v in _minus_mean(rewards)
            ],
            "You add the 0.0001 to the result: it belongs to the spread, so put brackets around their sum.": lambda rewards, spread: [
                v / spread + 1e-4 for v in _minus_mean(rewards)
            ],
            "You divide the mean alone: put brackets around the reward minus the mean.": lambda rewards, spread: [
                r - sum(rewards) / len(rewards) / (spread + 1e-4) for r in rewards
            ],
            "You compare with the best rollout of the group; compare with the mean.": lambda rewards, spread: [
                (reward - max(rewards)) / (spread + 1e-4) for reward in rewards
            ],
            "You have the sign the wrong way round: a reward above the mean has a positive advantage.": lambda rewards, spread: [
                -v / (spread + 1e-4) for v in _minus_mean(rewards)
            ],
        },
    ),
    Exercise(
        title="how far from the SFT policy",
        minutes=6,
        task="""
            The KL term keeps the trained student, the *policy*, near the model that it started from, the *reference*
            (here the student after SFT). Both give each sampled token a log-probability: p under the policy and r
            under the reference. The token then adds exp(r - p) - (r - p) - 1 (the estimator known as k3), which is 0
            where the two agree and positive elsewhere. Return the mean over the tokens that the student wrote itself.
            The feedback (image and request) stands in the same sequence, but the student did not choose it: leave it
            out, of the sum and of the count. All three arguments are NumPy arrays of the same length; at least one
            token is the student's own.
        """,
        hints=(
            "An array of booleans picks items out of another array: `values[own]`.",
            "Compute the gap, reference minus policy, for the student's own tokens only. Then the formula, item by "
            "item, and the mean of what comes out.",
            "`gap = (reference - policy)[own]`, then the mean of `np.exp(gap) - gap - 1`.",
        ),
        solution=my_kl,
        inputs=_tokens,
        imports="import numpy as np",
        mistakes={
            "You leave the feedback out of the count, but not out of the sum.": lambda policy, reference, own: (
                _k3(reference - policy).sum() / own.sum()
            ),
            "You take policy minus reference; the gap is reference minus policy.": lambda policy, reference, own: _k3(
                (policy - reference)[own]
            ).mean(),
            "You count the feedback tokens too, which the student did not write.": lambda policy, reference, own: _k3(
                reference - policy
            ).mean(),
            "You set the feedback tokens to 0 but still divide by the number of all tokens.": lambda policy, reference, own: (
                (_k3(reference - policy) * own).mean()
            ),
            "You give the sum over the tokens; give the mean, or a long answer counts as a far one.": lambda policy, reference, own: (
                _k3(reference - policy)[own].sum()
            ),
            "You average the plain difference (the estimator k1), which can be negative.": lambda policy, reference, own: (
                (policy - reference)[own].mean()
            ),
            "You average half of the squared gap, another estimator (k2).": lambda policy, reference, own: (
                ((reference - policy)[own] ** 2).mean() / 2
            ),
            "You leave out the - 1: two equal policies then seem to be 1 apart.": lambda policy, reference, own: (
                _k3(reference - policy)[own].mean() + 1
            ),
            "You leave out the gap itself: exp(gap) - 1 can be negative.": lambda policy, reference, own: (
                np.exp((reference - policy)[own]) - 1
            ).mean(),
            "You average the gaps first and put the mean into the formula; far tokens then cancel out.": lambda policy, reference, own: (
                _k3((reference - policy)[own].mean())
            ),
        },
    ),
)
