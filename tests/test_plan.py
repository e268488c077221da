"""The plan: its rules of thumb against a GPU, its counts against what a run really asks for."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import sample_records

from ivt_utils import ablations, cli, confidence, grpo, loop, mirage, pipeline, protocol, sft, student
from ivt_utils.paper_scale import plan
from ivt_utils.profiles import PROFILES, Profile, get_profile
from ivt_utils.runtime import pace
from ivt_utils.runtime.files import ROOT, ArtefactError
from ivt_utils.runtime.store import Run

BOX = (100, 200, 300, 400)
TEXT = protocol.answer_text(BOX, "It is too high and too narrow: move down and make it wider.")

# By tests/measure_plan.py, on an H200 with torch 2.11, transformers 5.23 and peft 0.21: the students of the Hub with
# random weights in 16 bits, LoRA of rank 64 in 32 bits, PyTorch's own attention. A row: chats in the batch, images in
# each, tokens of an image and of a chat; GB beyond weights and inputs at the peak of generating 128 tokens, and of a
# forward and backward pass with checkpointing, without the output head; seconds of generating 1 and 128 tokens, and of
# that pass.
MEASURED = {
    "paper": [
        (8, 3, 512, 1926, 5.158, 7.28, 0.74, 7.44, 1.59),
        (8, 3, 300, 1290, 3.404, 4.955, 0.52, 7.83, 1.09),
        (6, 3, 512, 1926, 3.867, 5.517, 0.56, 7.37, 1.22),
        (2, 2, 512, 1252, 0.841, 1.409, 0.14, 7.38, 0.42),
        (16, 1, 300, 365, 1.963, 2.926, 0.31, 6.79, 0.64),
    ],
    "colab": [
        (8, 3, 512, 1926, 3.797, 4.71, 0.45, 6.43, 0.86),
        (8, 3, 300, 1290, 2.499, 3.2, 0.3, 5.56, 0.6),
        (6, 3, 512, 1926, 2.845, 3.572, 0.35, 5.73, 0.67),
        (2, 2, 512, 1252, 0.619, 0.888, 0.09, 5.42, 0.36),
        (16, 1, 300, 365, 1.446, 1.871, 0.2, 6.18, 0.44),
    ],
}
H200 = 989  # TFLOP/s, its maker's figure


def test_the_rules_of_thumb_are_as_near_to_a_gpu_as_the_plan_says():
    memory, reached, token = [], [], []
    for name, rows in MEASURED.items():
        config = plan.configuration(get_profile(name))
        each, gradients = plan.token_bytes(config), 4 * plan.lora_parameters(config, 64)
        for chats, images, per_image, tokens, generating, learning, one, many, learned in rows:
            memory.append(generating * 1e9 / (chats * tokens * each["generating"]))
            memory.append(learning * 1e9 / (chats * tokens * each["learning"] + gradients))
            read = plan.REACHED * chats * plan.reading_seconds(config, H200, images, per_image, tokens)
            reached += [read / one, 3 * read / learned]
            token.append((many - one) / 127)
    assert f"{max(memory) - 1:.0%} above to {1 - min(memory):.0%} below".replace("%", " %") in plan.ASSUMED
    assert f"{100 * min(reached):.0f} to {max(reached):.0%}".replace("%", " %") in plan.ASSUMED
    assert f"{1000 * min(token):.0f} to {1000 * max(token):.0f} ms" in plan.ASSUMED
    assert min(reached) < plan.REACHED < max(reached) and min(token) < plan.TOKEN_SECONDS < max(token)


# --- what a run asks for


@pytest.mark.slow
def test_a_training_writes_the_checkpoint_that_is_planned(fresh_student, tmp_path):
    many = sample_records(8, "plan")
    steps = [{"text": TEXT, "box": BOX}] * 3
    made = [{"id": r["id"], "expression": r["expression"], "steps": steps} for r in many]
    rows = sft.trajectories_dataset(many, made)
    profile = replace(get_profile("smoke"), save_every=1)
    sft.train_sft(fresh_student, rows, tmp_path, profile, 0, steps=1)
    config = json.loads((ROOT / profile.student / "config.json").read_text())
    adapter = 4 * plan.lora_parameters(config, profile.lora_rank)
    written = sum(
        path.stat().st_size for path in (tmp_path / "checkpoint-1").glob("*") if path.suffix in (".safetensors", ".pt")
    )
    assert written == pytest.approx(3 * adapter, rel=0.15)


@pytest.mark.slow
def test_grpo_asks_for_as_many_answers_as_are_planned(fresh_student, tmp_path):
    """The student's answers are scripted, so that every rollout is whole and each answer as long as it may be."""
    words = fresh_student.processor.tokenizer.encode(TEXT + "<|im_end|>")
    profile, asked = replace(get_profile("smoke"), generations=4, grpo_turns=2, max_new_tokens=len(words)), []

    def generate(input_ids, **settings):
        asked.append(len(input_ids) * settings["generation_config"].max_new_tokens)
        return torch.cat([input_ids, torch.tensor([words] * len(input_ids))], 1)

    fresh_student.model.generate = generate
    log = grpo.train_grpo(fresh_student, grpo.prompts_dataset(sample_records(8, "plan")), tmp_path, profile, 0)
    assert len(log) == profile.grpo_steps and all(row["failed_rollouts"] == 0 for row in log)
    ((_, _, samples, each),) = [row for row in plan.answers(profile) if row[1] == "GRPO rollouts"]
    assert 2 * sum(asked) == samples * len(each) * profile.max_new_tokens  # two trainings


@pytest.fixture
def asked(monkeypatch, tmp_path, processor):
    """The answers that the stages of all notebooks ask for, by stage; no model, no training."""
    counts, now = {}, []

    def generate(_, chats, max_new_tokens, *__):
        counts[now[-1]] = counts.get(now[-1], 0) + len(chats) * max_new_tokens
        return [protocol.answer_text(BOX)] * len(chats)

    def train(_, __, folder, *___, **____):
        folder.joinpath("adapter").write_text("")
        counts["trained"] = counts.get("trained", 0) + 1

    def sure(_, __, rollouts, **___):
        return [{**r, "steps": [{**s, "likelihood": 0.0, "fits": 0.5} for s in r["steps"]]} for r in rollouts]

    stub = student.Student(SimpleNamespace(), processor, 10)
    monkeypatch.setattr(loop, "generate", generate)
    monkeypatch.setattr(confidence, "with_confidence", sure)
    for module in (pipeline, ablations, mirage):
        monkeypatch.setattr(module, "load_student", lambda *_, **__: stub)
        for name in {"train_sft", "train_grpo"} & set(dir(module)):
            monkeypatch.setattr(module, name, train)
    profile = replace(get_profile("smoke"), resamples=10, generations=3, turns=1, ablation_test=9)
    run = Run(profile, 0, tmp_path / "run")
    for name, make in pipeline.STAGES.items():
        now.append(name)
        make(run)
    return profile, counts


@pytest.mark.slow
def test_the_answers_of_a_run_are_those_that_its_stages_ask_for(asked):
    profile, counts = asked
    planned = {}
    for notebook, stage, samples, each in plan.answers(profile):
        # only notebook 4 shows the first, and a training of GRPO, which is not run here, makes the second
        if "rollouts" not in stage and stage not in ("groups to look at", "GRPO's learning curve"):
            planned[notebook] = planned.get(notebook, 0) + samples * len(each) * profile.max_new_tokens
    assert counts["eval"] == planned["01"] + planned["02"]
    assert [counts[k] for k in ("sft", "grpo", "ablations", "mirage")] == [planned[f"0{n}"] for n in range(3, 7)]
    assert counts["trained"] == sum(plan.TRAININGS.values())


# --- the plan as a whole

NOTHING = {"gpu": None, "gpu_bytes": None, "ram_bytes": 1e9, "disk_bytes": 1e9}
LARGE = {"gpu": "a card", "gpu_bytes": 200e9, "ram_bytes": 500e9, "disk_bytes": 500e9}


@pytest.mark.parametrize("name", ["colab", "paper"])
def test_the_plan_for_a_gpu_says_its_parts_assumptions_and_warnings(name):
    profile = get_profile(name)
    text = plan.plan_text(profile, NOTHING)
    for part in (*plan.CARDS, *plan.SETTINGS, "weights", "adapter", "batch", "3.51", "Hours", profile.student):
        assert part in text, part
    assert f"warning: No CUDA card here: {name} needs one." in text and "GB of free disk" in text
    assert text.endswith(plan.ASSUMED) and not plan.warnings(profile, LARGE)
    spent = {card: sum(plan.hours(profile, tflops).values()) for card, (_, tflops) in plan.CARDS.items()}
    assert min(spent, key=spent.get) == "H100 80 GB" and max(spent, key=spent.get) == "T4"


def test_a_card_that_is_too_small_is_named_with_the_settings_to_lower():
    told = plan.warnings(get_profile("paper"), {**LARGE, "gpu": "GTX 1080", "gpu_bytes": 11e9})
    assert any("GRPO, rollouts" in line and "GTX 1080 has 11.0 GB: lower grpo_generated" in line for line in told)
    assert not any("SFT" in line for line in told)


@pytest.mark.parametrize("name", ["colab", "paper"])
def test_batches_are_as_large_as_a_card_holds_and_no_larger(name):
    profile, sizes = get_profile(name), []
    stages = {
        "evaluation, harvest": ("batch_size", [2**k for k in range(7)]),
        "GRPO, rollouts": ("grpo_generated", range(6, 25, 6)),
    }
    for card_bytes in (8e9, 16e9, 24e9, 40e9, 80e9, 200e9):
        own = plan.fitted(profile, card_bytes)
        assert own.recipe() == profile.recipe()
        for stage, (setting, choices) in stages.items():
            need = {n: sum(plan.memory(replace(own, **{setting: n}))[stage].values()) for n in choices}
            held = [n for n in choices if need[n] <= plan.USABLE * card_bytes]
            assert need[getattr(own, setting)] == max([need[n] for n in held] or [min(need.values())])
        sizes.append((own.batch_size, plan.rollouts_at_once(own)))
    fewer = plan.fitted(replace(profile, most_at_once=12), 200e9)
    assert (fewer.batch_size, plan.rollouts_at_once(fewer)) == (8, 12)
    assert sizes == sorted(sizes) and sizes[-1] == (64, profile.grpo_prompts * 6) and sizes[0][0] < 64


def test_the_stages_of_a_gpu_run_take_batches_that_fit_its_card(monkeypatch, capsys):
    paper, micro = get_profile("paper"), get_profile("micro")
    assert cli.fit_to_card(paper, True) is paper  # no card here
    monkeypatch.setattr(plan, "this_machine", lambda: LARGE)
    assert cli.fit_to_card(micro, True) is micro and capsys.readouterr().out == ""
    assert cli.fit_to_card(paper, True) == plan.fitted(paper, LARGE["gpu_bytes"])
    assert capsys.readouterr().out == "This card answers 64 samples and 24 of GRPO's rollouts at once.\n"
    other = replace(paper, student="somebody/another-student")
    assert cli.fit_to_card(other, True) is other
    batch = replace(paper, scale_rewards="batch")  # there the rollouts that are generated together belong to the recipe
    assert plan.fitted(batch, LARGE["gpu_bytes"]).grpo_generated == batch.grpo_generated
    monkeypatch.setenv("WORLD_SIZE", "5")  # which cannot share GRPO's batch, but may answer
    monkeypatch.setattr(cli.distributed, "agree", lambda value: value)
    assert cli.fit_to_card(paper, False) == replace(paper, batch_size=64)
    assert capsys.readouterr().out == "This card answers 64 samples at once.\n"


def test_every_stage_has_settings_that_a_profile_has():
    told = plan.warnings(get_profile("paper"), {**LARGE, "gpu_bytes": 2e9})
    for stage, settings in plan.SETTINGS.items():
        assert any(line.startswith(f"{stage} may take") and f"lower {settings} in" in line for line in told)
        assert set(settings.replace(",", "").replace(" or", "").split()) <= {f.name for f in fields(Profile)}


def test_each_setting_of_memory_makes_its_stage_smaller():
    profile = replace(get_profile("paper"), grpo_generated=24)
    whole = {stage: sum(parts.values()) for stage, parts in plan.memory(profile).items()}
    for stage, name in (
        ("evaluation, harvest", "batch_size"),
        ("SFT", "sft_device_batch"),
        ("SFT", "max_pixels"),
        ("GRPO, rollouts", "max_pixels"),
        ("GRPO, rollouts", "grpo_generated"),
        ("GRPO, learning", "max_pixels"),
        ("GRPO, learning", "grpo_device_batch"),
    ):
        less = plan.memory(replace(profile, **{name: getattr(profile, name) // 2}))
        assert sum(less[stage].values()) < whole[stage], name
    more = plan.memory(replace(profile, sft_device_batch=0, grpo_device_batch=0))
    assert all(sum(more[stage].values()) > whole[stage] for stage in ("SFT", "GRPO, learning"))


def test_the_micro_plan_needs_no_card_and_no_download():
    time = pace.clock(sum(pace.section_seconds("micro")["04_grpo"].values()))
    text = plan.plan_text(get_profile("micro"))
    assert f"04 {time}" in text and "No GPU and no download" in text and "warning" not in text
    assert "not measured" in plan.plan_text(get_profile("smoke"))


def test_this_machine_has_memory_and_a_disk():
    found = plan.this_machine()
    assert set(found) == set(LARGE) and found["disk_bytes"] > 0 and found["ram_bytes"] > 1e8
    assert bool(found["gpu"]) == torch.cuda.is_available()


def test_unknown_names_are_one_sentence():
    with pytest.raises(ValueError, match="There is no profile 'huge'; choose one of"):
        get_profile("huge")
    with pytest.raises(ArtefactError, match="There is no configuration of some/model to plan with; known are"):
        plan.plan_text(replace(get_profile("paper"), student="some/model"), LARGE)


@pytest.mark.slow
def test_a_plan_is_made_without_loading_torch():
    code = (
        "import sys; from ivt_utils.paper_scale.plan import plan_text; from ivt_utils.profiles import get_profile; "
        "[plan_text(get_profile(name), warn=False) for name in ('micro', 'paper')]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_every_student_of_the_hub_has_a_configuration():
    for profile in PROFILES.values():
        assert not profile.hub_student or plan.configuration(profile)["text_config"]["hidden_size"]
    for name in plan.CONFIGURATIONS.values():
        assert json.loads((ROOT / "data" / "qwen3vl" / name).read_text())["student"] in plan.CONFIGURATIONS
