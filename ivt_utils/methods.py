"""The methods of the course, one row for each: names of stages, adapters, tables and figures come from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How one row of the main table comes about. Its rollouts are the stage of its name in `METHODS`.

    label: its name in tables and figures.
    adapter: the one that the student carries, None for the base student.
    single: it is scored on its first answer alone, and no loop is run.
    long: it is the loop of `profile.long_turns`; the loop of `profile.turns` is its beginning.
    asked: notebook 6 asks this student for confidence, sampled answers and controls. (The base student has never met
        `protocol.TRACE_FITS`.)
    """

    label: str
    adapter: str | None = None
    single: bool = False
    long: bool = False
    asked: bool = False


METHODS = {
    "base_single": Method("base, single shot", single=True),
    "base_ivt": Method("base + IVT, no training"),
    "base_ivt_bare": Method("base + loop, bare image"),
    "sft_ivt": Method("SFT + IVT", "sft", asked=True),
    "sft_grpo_ivt": Method("SFT + GRPO + IVT", "grpo", asked=True),
    "grpo_single": Method("GRPO, single step, no IVT", "grpo_single", single=True),
    "sft_keep_ivt": Method("SFT (keep) + IVT", "sft_keep", asked=True),
    "sft_keep_grpo_ivt": Method("SFT (keep) + GRPO + IVT", "grpo_keep"),
    "base_ivt_long": Method("base + IVT, long", long=True),
    "sft_ivt_long": Method("SFT + IVT, long", "sft", long=True),
    "sft_grpo_ivt_long": Method("SFT + GRPO + IVT, long", "grpo", long=True),
    "sft_keep_ivt_long": Method("SFT (keep) + IVT, long", "sft_keep", long=True),
    "sft_keep_grpo_ivt_long": Method("SFT (keep) + GRPO + IVT, long", "grpo_keep", long=True),
}
SINGLE = tuple(name for name, method in METHODS.items() if method.single)
TRAINED = tuple(name for name, method in METHODS.items() if method.adapter)  # another seed gives another student
ADAPTERS = tuple(dict.fromkeys(method.adapter for method in METHODS.values() if method.adapter))
ASKED = tuple(name for name, method in METHODS.items() if method.asked)
STAGES = {  # what `ivt` runs without a notebook, by the functions of these names in `pipeline.STAGES`
    "eval": "notebooks 1 and 2: the base student's answers",
    "sft": "notebooks 2 and 3: the harvest, SFT, and its answers",
    "grpo": "notebook 4: GRPO, and its answers",
    "ablations": "notebook 5",
    "mirage": "notebook 6: confidence, sampled answers and controls",
}


def method_label(name: str) -> str:
    """Return a method's name in tables and figures; of rollouts that no method has, the name of their stage."""
    return METHODS[name].label if name in METHODS else name


def longer(name: str) -> str:
    """Return the name of the stage that holds the longer loop of a method."""
    return f"{name}_long"
