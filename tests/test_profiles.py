"""Profiles: four names, the paper's values, and a sentence for any other name."""

from dataclasses import FrozenInstanceError, fields

import pytest

from ivt_utils.profiles import PROFILES, STUDENT_RECIPE, get_profile, grpo_trial


def test_the_four_profiles_by_name():
    assert list(PROFILES)[:4] == ["smoke", "micro", "colab", "paper"]  # a researcher's own may follow
    assert all(get_profile(name).name == name for name in PROFILES)


@pytest.mark.parametrize("name", ["", "Micro", "large", None])
def test_an_unknown_profile_is_one_sentence_with_the_choices(name):
    with pytest.raises(ValueError) as caught:
        get_profile(name)
    message = str(caught.value)
    assert repr(name) in message and all(choice in message for choice in PROFILES) and message.count(".") == 1


def test_the_papers_values():
    paper = get_profile("paper")
    assert (paper.train, paper.val, paper.test) == (2400, 510, 505)
    assert paper.student == "Qwen/Qwen3-VL-4B-Instruct" and paper.load_in_4bit and paper.lora_rank == 64
    for profile in map(get_profile, ("smoke", "micro", "colab", "paper")):
        values = profile.turns, profile.harvest_max_iou, profile.generations, profile.beta, profile.format_bonus
        assert values == (2, 0.85, 6, 0.04, 0.1)


def test_the_profiles_share_one_code_path_and_differ_in_values_only():
    assert len({tuple(field.name for field in fields(profile)) for profile in PROFILES.values()}) == 1
    smoke, micro = get_profile("smoke"), get_profile("micro")
    assert smoke.student == micro.student and smoke.data == micro.data == "synthetic"
    assert all(getattr(smoke, size) < getattr(micro, size) for size in ("train", "val", "test", "grpo_steps"))


def test_a_profile_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        get_profile("micro").turns = 3
    with pytest.raises(FrozenInstanceError):
        STUDENT_RECIPE.lr = 1.0


@pytest.mark.parametrize("name", ["paper", "colab"])
def test_a_dry_run_has_the_settings_of_its_profile_and_the_size_of_a_test(name):
    real, dry = get_profile(name), get_profile(f"{name}-dry-run")
    changed = {field.name for field in fields(real) if getattr(real, field.name) != getattr(dry, field.name)}
    assert changed <= {
        "name",
        "student",
        "student_revision",
        "grid",
        "max_pixels",
        "train",
        "val",
        "test",
        "sft_epochs",
        "grpo_steps",
        "ablation_sft_steps",
        "ablation_grpo_steps",
        "resamples",
        "save_every",
    }
    assert (dry.train, dry.val, dry.test) == (8, 8, 8) and not dry.hub_student and real.hub_student


@pytest.mark.parametrize("name", ["micro-dry-run", "huge-dry-run", "-dry-run"])
def test_other_dry_runs_are_one_sentence(name):
    with pytest.raises(ValueError) as caught:
        get_profile(name)
    assert str(caught.value).count(".") == 1


@pytest.mark.parametrize("name", [*PROFILES, "paper-dry-run"])
def test_a_trial_of_grpo_is_the_profile_with_few_small_steps(name):
    profile = get_profile(name)
    trial = grpo_trial(profile)
    changed = {f.name for f in fields(profile) if getattr(profile, f.name) != getattr(trial, f.name)}
    assert changed <= {"grpo_turns", "grpo_steps", "grpo_prompts", "grpo_warmup", "grpo_probe"}
    assert trial.grpo_turns == profile.turns and trial.grpo_steps <= min(3, profile.grpo_steps)
    assert trial.grpo_warmup == 0 and trial.grpo_probe <= profile.grpo_probe
