"""The course's targets, and what the interval of a result says of a claim."""

import math

from ivt_utils import closer, metrics
from ivt_utils.schema import Cell


def by_name(rows) -> dict[tuple[str, str], dict]:
    """Return rows of "differences" or "seeds" by their name and metric; of two rows the later one."""
    return {(row["name"], row["metric"]): row for row in rows}


def verdict(cell: Cell | None, least: float = -math.inf, most: float = math.inf, strict: bool = False) -> str | None:
    """Return what the interval of a cell says of the claim that its value lies from `least` to `most`.

    "reached" where the whole interval lies inside the claim, "not reached" where all of it lies outside, "open" where
    it holds both or where there is no interval, None without a cell: not run. A limit of the interval that equals one
    of the claim is inside, or outside where the claim is `strict` ("above 0").
    """
    if cell is None:
        return None
    slack = 1e-9 if strict else -1e-9  # whatever the last bit of a limit is
    lower, upper = metrics.side(cell, least + slack), metrics.side(cell, most - slack)
    if (lower, upper) == ("above", "below"):
        return "reached"
    return "not reached" if lower == "below" or upper == "above" else "open"


def targets(results: dict) -> list[dict]:
    """Return the course's targets, each {"key", "claim", "unit", "value", "low", "high", "n", "trainings", "verdict"}.

    "verdict" is that of the function of this name, by the interval; None when a method that it needs was not run.
    "trainings": over how many seeds the interval speaks, where several were trained; None: one training, or none.
    "unit": "share", "difference" of shares, "ratio", "IoU".
    """
    methods = {name: method["metrics"] for name, method in results["methods"].items()}
    compared = by_name((*results["differences"], *results.get("seeds", [])))  # of several trainings, where there are

    def difference(name, metric="acc50"):
        return compared.get((name, metric))

    def level(name, metric):
        return difference(name, metric) or methods.get(name, {}).get(metric)

    def target(key, claim, unit, cell, *limits, **strict):
        shown = {name: cell[name] if cell else None for name in ("value", "low", "high", "n")}
        trainings = len(cell["seeds"]) if cell and "seeds" in cell else None
        return {
            "key": key,
            "claim": claim,
            "unit": unit,
            **shown,
            "trainings": trainings,
            "verdict": verdict(cell, *limits, **strict),
        }

    fall = difference("base_ivt worst step - base_ivt step 0")
    worst = f"worst step (step {fall['step']}, chosen with the truth)" if fall else "worst step"
    parsed = [
        step["parsed"]
        for name in ("base_ivt", "base_ivt_long")
        if name in methods
        for step in methods[name]["per_step"]
    ]
    order = ("not reached", "open", "reached")
    least = min(parsed, key=lambda cell: (order.index(verdict(cell, 0.99)), cell["value"]), default=None)
    part = " degradation - a fifth of "
    mended = difference(f"sft_grpo_ivt{part}sft_ivt degradation", "degradation_per_step")
    fifth = "IoU lost a step: SFT + GRPO's minus a fifth of SFT's, at most 0"
    if mended and verdict(level("sft_ivt", "degradation_per_step"), 0, strict=True) != "reached":
        mended = mended | {"low": None, "high": None}
        fifth += "; SFT's own loss is not above 0 by its interval, so there is nothing to mend"
    curve = results.get("learning_curve", {}).get("grpo", {})
    gains = {row["name"]: row for row in results.get("closer", []) if row["seed"] == "mean"}
    gains = [gains[name]["acc50"] | {"seeds": gains[name]["seeds"]} for name in closer.GAINS if name in gains]
    smaller = min(gains, key=lambda cell: cell["value"], default=None)
    each = {verdict(cell, 0, strict=True) for cell in gains}
    look = next((method for method in order if method in each), None)
    return [
        target(
            "a",
            f"base + IVT at its {worst}: Acc@0.5 at least 20 points below step 0",
            "difference",
            fall,
            -math.inf,
            -0.2,
        ),
        target(
            "b",
            "of that fall, the loop with the bare image loses less than a quarter",
            "ratio",
            difference("base_ivt_bare loss / base_ivt loss at its worst step", "acc50_loss_ratio"),
            -math.inf,
            0.25,
            strict=True,
        ),
        target(
            "c",
            "the untrained loop, every step of the short and of the long one: at least 99 % of the answers "
            "parse; shown: the step for which this holds least",
            "share",
            least,
            0.99,
        ),
        target(
            "d",
            "base, single shot: Acc@0.5 from 75 to 88 %",
            "share",
            methods.get("base_single", {}).get("final", {}).get("acc50"),
            0.75,
            0.88,
        ),
        target(
            "e",
            "SFT + IVT, oracle best step: Acc@0.5 at least 2.4 points above single shot",
            "difference",
            difference("sft_ivt oracle best step - base_single", "oracle_acc50"),
            0.024,
        ),
        target(
            "f",
            "SFT + IVT, step 0: Acc@0.5 not below single shot",
            "difference",
            difference("sft_ivt step 0 - base_single"),
            0,
        ),
        target("g", fifth, "IoU", mended, -math.inf, 0),
        target(
            "h",
            "IoU lost a step in the long loop: SFT + GRPO less than SFT",
            "IoU",
            difference("sft_grpo_ivt_long degradation - sft_ivt_long degradation", "degradation_per_step"),
            -math.inf,
            0,
            strict=True,
        ),
        target(
            "i",
            "SFT + GRPO + IVT: at least 50 % of the samples end with the IoU of step 0 (the paper: 64 %)",
            "share",
            level("sft_grpo_ivt", "share_stay"),
            0.5,
        ),
        target(
            "j",
            "learning curve of GRPO: mean IoU of the final answers in its last quarter above that in its first",
            "IoU",
            curve.get("difference"),
            0,
            strict=True,
        ),
        target(
            "k",
            "SFT + GRPO + IVT, final: Acc@0.5 at most one point below single shot",
            "difference",
            difference("sft_grpo_ivt final - base_single"),
            -0.01,
        ),
        target(
            "l",
            "a closer look (ours): last answer above single shot and above its own first one; shown: the "
            "smaller of the two",
            "difference",
            smaller,
        )
        | {"verdict": look},
        target(
            "m",
            "IoU lost a step in the long loop, GRPO from SFT that keeps what fits: minus a fifth of SFT's, at most 0",
            "IoU",
            difference(f"sft_keep_grpo_ivt_long{part}sft_keep_ivt_long degradation", "degradation_per_step"),
            -math.inf,
            0,
        ),
        target(
            "n",
            "the same student: at least 50 % of the samples end the long loop with the IoU of step 0",
            "share",
            level("sft_keep_grpo_ivt_long", "share_stay"),
            0.5,
        ),
    ]
