"""The plan: its formulas against what the micro student really takes, its counts against what a run really asks for.

Memory is measured by PyTorch's profiler, as the largest sum of all blocks that are allocated at one time, so it does
not depend on the machine.
"""

import contextlib
import copy
import json
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import sample_records

from ivt_utils import ablations, confidence, grpo, loop, mirage, pipeline, protocol, sft, student
from ivt_utils.paper_scale import memory, plan
from ivt_utils.profiles import PROFILES, Profile, get_profile
from ivt_utils.runtime import pace
from ivt_utils.runtime.store import ROOT, ArtefactError, Run

NEAR = 0.15  # how far a prediction may be from the measured peak
BOX = (100, 200, 300, 400)
TEXT = protocol.answer_text(BOX, "It is too high and too narrow: move down and make it wider.")
WIDE = {"text_config": {"num_key_value_heads": 2}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}  # as Qwen's


def peak_of(run) -> int:
    """The bytes that `run` holds at its peak, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    blocks = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(blocks, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def near(measured: int, predicted: int, share: float = NEAR) -> bool:
    print(f"measured {measured / 1e6:.1f} MB, predicted {predicted / 1e6:.1f} MB ({predicted / measured - 1:+.0%})")
    return abs(predicted / measured - 1) <= share


@pytest.fixture(scope="module")
def many():
    return sample_records(32, "plan")


@pytest.fixture(scope="module")
def rows(many):
    steps = [{"text": TEXT, "box": BOX}] * 3
    made = [{"id": r["id"], "expression": r["expression"], "steps": steps} for r in many]
    return sft.trajectories_dataset(many, made)


MICRO = memory.configuration(get_profile("micro"))
PROFILE = replace(get_profile("smoke"), sft_batch=16, grpo_prompts=4, generations=4, save_every=100, batch_size=32,
                  long_turns=2, grpo_turns=2)


def build(changes: dict | None = None) -> tuple[dict, object]:
    """A configuration, the micro student's with some changes, and its model with random weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = copy.deepcopy(MICRO)
    for part, change in (changes or {}).items():
        values[part] |= change
    settings = {key: value for key, value in copy.deepcopy(values).items() if key != "image_processor"}
    return values, Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings)).eval()


# --- counts


@pytest.mark.parametrize("changes", [None, WIDE])
def test_the_parts_of_the_micro_student_are_counted_exactly(changes):
    from peft import get_peft_model

    values, model = build(changes)
    parts = memory.parameters(values)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    seeing = sum(v for k, v in parts.items() if "vision" in k or "mergers" in k)
    assert seeing == sum(p.numel() for p in model.model.visual.parameters())
    assert memory.weight_bytes(values, False, 4) == sum(p.nbytes for p in model.parameters())
    adapted = get_peft_model(model, student.lora(PROFILE))
    learning = [p for p in adapted.parameters() if p.requires_grad]
    assert memory.lora_parameters(values, PROFILE.lora_rank) == sum(p.numel() for p in learning)


def test_the_micro_student_s_images_and_texts_have_the_assumed_tokens(processor, many):
    question, feedback, answer = memory.words(PROFILE)
    asked = [processor.apply_chat_template([protocol.question(r["image"], r["expression"])], tokenize=True,
                                           add_generation_prompt=True)[0] for r in many]  # fmt: skip
    assert memory.image_tokens(MICRO, (192, 192)) == memory.most_image_tokens(MICRO, 0) == 36
    assert abs(sum(map(len, asked)) / len(asked) - 36 - question) < 4
    encode = processor.tokenizer.encode
    marks = "\n<|im_start|>user\n<|vision_start|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    assert abs(len(encode(protocol.FEEDBACK.join(marks))) - feedback) <= 3
    assert len(encode(protocol.answer_text(BOX))) < answer and len(encode(TEXT)) <= answer < PROFILE.max_new_tokens


# --- memory of one pass


def chats_of(processor, many):
    chats = [[protocol.question(r["image"], r["expression"]), protocol.answer("x"),
              protocol.feedback(r["image"], None)] for r in many]  # fmt: skip
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip


def collated(processor, rows) -> dict:
    """A batch of 16 trajectories as SFT's collator makes it, without labels."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    batch = DataCollatorForVisionLanguageModeling(processor=processor, max_length=None)([rows[i] for i in range(16)])
    return {key: value for key, value in batch.items() if key != "labels"}


def autocast(kind):
    return torch.autocast("cpu", kind) if kind == torch.bfloat16 else contextlib.nullcontext()


@pytest.mark.slow
@pytest.mark.parametrize("changes, kind, adapter", [
    (None, torch.float32, False), (WIDE, torch.float32, True), (WIDE, torch.bfloat16, True),
])  # fmt: skip
def test_generation_takes_what_is_predicted(processor, many, changes, kind, adapter):
    from peft import get_peft_model

    values, model = build(changes)
    model, kept = model.to(kind), {}
    model = get_peft_model(model, student.lora(PROFILE)).eval() if adapter else model
    tokens = chats_of(processor, many)["input_ids"].shape[1]

    def run():
        inputs = chats_of(processor, many)
        with torch.inference_mode():
            kept["out"] = model.generate(**inputs, max_new_tokens=48, min_new_tokens=48, do_sample=False,
                                         return_dict_in_generate=True)  # fmt: skip

    measured, element = peak_of(run), kind.itemsize
    parts = memory.generation_bytes(values, len(many), 2, 36, tokens, 48, element)
    cache = kept["out"].past_key_values
    length = cache.get_seq_length()
    assert length == tokens + 48 - 1  # the last token is not read again
    assert memory.kv_cache_bytes(values, len(many), length, element) == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )
    assert parts["images"] == chats_of(processor, many)["pixel_values"].nbytes
    assert near(measured, sum(parts.values()))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_vision_tower_takes_what_is_predicted(processor, many, kind):
    inputs, tower = chats_of(processor, many), build()[1].model.visual.to(kind)

    def run():
        with torch.inference_mode():
            tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])

    assert near(peak_of(run), memory.vision_bytes(MICRO, len(inputs["pixel_values"]), kind.itemsize))


@pytest.mark.parametrize("changes, kind", [(None, torch.float32), (WIDE, torch.float32), (WIDE, torch.bfloat16)])
def test_a_layer_keeps_what_is_predicted_for_its_backward_pass(processor, rows, changes, kind):
    from peft import get_peft_model

    values, model = build(changes)
    model = get_peft_model(model.to(kind), student.lora(PROFILE)).train()
    batch, kept = collated(processor, rows), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), autocast(kind):
        hidden = model.get_base_model().model(**batch, use_cache=False).last_hidden_state
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    layers, size = values["text_config"]["num_hidden_layers"], hidden.shape[:2]
    predicted = layers * memory.layer_bytes(values, *size, PROFILE.lora_rank, kind.itemsize)
    assert near(measured, predicted, 0.08)


DEEP, TALKATIVE = {"text_config": {"num_hidden_layers": 24}}, {"text_config": {"vocab_size": 2000}}


@pytest.mark.slow
@pytest.mark.parametrize("changes, kind, checkpointing, headed", [
    (None, torch.float32, False, True), (None, torch.float32, False, False), (None, torch.float32, True, True),
    (None, torch.float32, True, False), (DEEP, torch.float32, True, False), (TALKATIVE, torch.float32, True, True),
    (WIDE, torch.bfloat16, False, True), (WIDE, torch.bfloat16, False, False), (WIDE, torch.bfloat16, True, True),
    (WIDE, torch.bfloat16, True, False),
])  # fmt: skip
def test_a_training_pass_takes_what_is_predicted(processor, rows, changes, kind, checkpointing, headed):
    """With TRL's output head, which takes the most on a CPU, and without it."""
    from peft import get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    values, model = build(changes)
    add_fused_lm_head(model.to(kind), outputs=("log_probs", "entropy"))
    model = get_peft_model(model, student.lora(PROFILE)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable()
    batch = collated(processor, rows)
    chats, tokens = batch["input_ids"].shape

    def run():
        with autocast(kind):
            if headed:
                loss = -model(**batch, labels=batch["input_ids"], fused_lm_head=True).log_probs.sum()
            else:
                loss = model.get_base_model().model(**batch, use_cache=False).last_hidden_state.sum()
        loss.backward()

    rank, scored = PROFILE.lora_rank, chats * (tokens - 1) if headed else 0
    parts = memory.training_bytes(values, chats, 3, 36, tokens, scored, rank, kind.itemsize, checkpointing, fused=False)
    gradients = 4 * memory.lora_parameters(values, rank)
    assert near(peak_of(run), parts["activations"] + parts["output head"] + gradients)
    assert (parts["output head"] > 1e8) == headed and parts["images"] == 2 * batch["pixel_values"].nbytes


# --- memory of a stage, with the project's own functions


def predicted(stage: str, profile) -> int:
    """The bytes of a stage, without what Python and its libraries take."""
    parts = memory.memory(profile)[stage]
    return sum(parts.values()) - parts["overhead"]


def weights_of(given) -> int:
    return sum(p.nbytes for p in given.model.parameters())


@pytest.mark.slow
def test_an_evaluation_takes_what_is_planned(fresh_student, many):
    measured = peak_of(lambda: loop.evaluate(fresh_student, many, PROFILE)) + weights_of(fresh_student)
    assert near(measured, predicted("evaluation, harvest", PROFILE)) and measured > 80e6


@pytest.mark.slow
def test_sft_takes_what_is_planned(fresh_student, rows, tmp_path):
    there = weights_of(fresh_student)
    profile = replace(PROFILE, save_every=1)
    measured = there + peak_of(lambda: sft.train_sft(fresh_student, rows, tmp_path, profile, 0, steps=2))
    assert near(measured, predicted("SFT", profile)) and measured > 80e6
    adapter = 4 * memory.lora_parameters(MICRO, profile.lora_rank)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").glob("*")
                     if path.suffix in (".safetensors", ".pt"))  # fmt: skip
    assert near(written, adapter) and near(checkpoint, 3 * adapter)
    assert plan.disk(profile)["two checkpoints of a training"] == 6 * adapter
    parts = memory.memory(profile)
    assert near((tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size, parts["SFT"]["optimiser"])
    assert parts["SFT"]["LoRA"] == parts["SFT"]["gradients"] == adapter == parts["evaluation, harvest"]["LoRA"]
    for stage in ("GRPO, rollouts", "GRPO, learning"):  # with the reference policy's copy
        assert parts[stage]["LoRA"] == parts[stage]["optimiser"] == 2 * adapter


@pytest.mark.slow
def test_grpo_takes_what_is_planned_and_asks_for_as_many_answers(fresh_student, many, tmp_path):
    """The student's answers are scripted, so that every rollout is whole and each answer as long as it may be."""
    words = fresh_student.processor.tokenizer.encode(TEXT + "<|im_end|>")
    profile, asked = replace(PROFILE, max_new_tokens=len(words)), []

    def generate(input_ids, **settings):
        asked.append(len(input_ids) * settings["generation_config"].max_new_tokens)
        return torch.cat([input_ids, torch.tensor([words] * len(input_ids))], 1)

    fresh_student.model.generate, there = generate, weights_of(fresh_student)
    prompts, log = grpo.prompts_dataset(many), []

    def run():
        log.extend(grpo.train_grpo(fresh_student, prompts, tmp_path, profile, 0, steps=2))

    measured = there + peak_of(run)
    assert len(log) == 2 and all(row["failed_rollouts"] == 0 for row in log)
    assert near(measured, predicted("GRPO, learning", profile)) and measured > 200e6
    (_, _, samples, each), = [row for row in plan.answers(profile) if row[1] == "GRPO rollouts"]  # fmt: skip
    assert profile.grpo_steps == 2 and 2 * sum(asked) == samples * len(each) * profile.max_new_tokens  # two trainings


# --- time


def test_the_operations_of_a_pass_are_those_that_torch_counts(processor, many):
    from torch.utils.flop_counter import FlopCounterMode

    values, model = build(WIDE)
    model.set_attn_implementation("eager")  # torch does not count its own attention on a CPU
    inputs = chats_of(processor, many)
    chats, tokens = inputs["input_ids"].shape
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model(**inputs)
    text, vision = plan.forward_flops(values, 2, 36, tokens)
    counted = counter.get_flop_counts()
    assert near(sum(counted["Qwen3VLModel.visual"].values()), chats * vision, 0.01)
    assert near(sum(counted["Qwen3VLModel.language_model"].values()), chats * text)  # eager: not causal


def test_a_token_is_bound_by_the_weights_that_are_read():
    paper, card = memory.configuration(get_profile("paper")), (16, 300, 65)
    one, two = (plan.generation_seconds(paper, card, 8, 8, 1, 300, 400, new) for new in (0, 100))
    read = memory.weight_bytes(paper, True) + memory.kv_cache_bytes(paper, 8, 400)
    assert near((two - one) / 100, max(read / (300e9 * plan.REACHED), plan.TOKEN_SECONDS))
    wide = (16, 3000, 65)
    one, two = (plan.generation_seconds(paper, wide, 8, 8, 1, 300, 400, new) for new in (0, 100))
    assert (two - one) / 100 == pytest.approx(plan.TOKEN_SECONDS)
    flops = sum(plan.forward_flops(paper, 1, 300, 400))
    assert one == pytest.approx(8 * flops / (65e12 * plan.REACHED)) and flops > 2 * 3.6e9 * 400


# --- answers of a whole run


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
    text, found = plan.plan_text(profile, NOTHING), plan.plan(profile, NOTHING)
    for part in ("weights", "LoRA", "optimiser", "gradients", "KV cache", "activations", "output head", *plan.CARDS,
                 "evaluation, harvest", "GRPO, rollouts", "not known", "3.51", "Hours", profile.student):  # fmt: skip
        assert part in text, part
    assert f"warning: No CUDA card here: {name} needs one." in text and "GB of free disk" in text
    assert all(f"assumed: {sentence}" in text for sentence in found["assumed"]) and len(found["assumed"]) > 6
    assert str(plan.REACHED * 100)[:2] in text and f"{plan.TOKEN_SECONDS * 1000:.0f} ms" in text
    assert all(sum(found["typical"][stage].values()) < sum(parts.values()) for stage, parts in found["memory"].items())
    assert not plan.warnings(profile, LARGE)
    spent = {card: sum(parts.values()) for card, parts in found["hours"].items()}
    assert min(spent, key=spent.get) == "H100 80 GB" and max(spent, key=spent.get) == "T4"


def test_a_card_that_is_too_small_is_named_with_the_settings_to_lower():
    told = plan.warnings(get_profile("paper"), {**LARGE, "gpu": "GTX 1080", "gpu_bytes": 11e9})
    assert any("GRPO, rollouts" in line and "GTX 1080 has 11.0 GB: lower grpo_device" in line for line in told)
    assert not any("SFT" in line for line in told)


def test_every_stage_has_settings_that_a_profile_has():
    told = plan.warnings(get_profile("paper"), {**LARGE, "gpu_bytes": 2e9})
    for stage, settings in plan.SETTINGS.items():
        assert any(line.startswith(f"{stage} may take") and f"lower {settings} in" in line for line in told)
        assert set(settings.replace(",", "").replace(" or", "").split()) <= {f.name for f in fields(Profile)}


def test_each_setting_of_memory_makes_its_stage_smaller():
    profile = get_profile("paper")
    whole = {stage: sum(parts.values()) for stage, parts in memory.memory(profile).items()}
    for stage, name in (("evaluation, harvest", "batch_size"), ("SFT", "sft_device_batch"), ("SFT", "max_pixels"),
                        ("GRPO, rollouts", "max_pixels"), ("GRPO, learning", "max_pixels"),
                        ("GRPO, learning", "grpo_device_batch")):  # fmt: skip
        less = memory.memory(replace(profile, **{name: getattr(profile, name) // 2}))
        assert sum(less[stage].values()) < whole[stage], name
    more = memory.memory(replace(profile, sft_device_batch=0, grpo_device_batch=0))
    assert all(sum(more[stage].values()) > whole[stage] for stage in ("SFT", "GRPO, rollouts", "GRPO, learning"))


def test_the_micro_plan_needs_no_card_and_no_download():
    time = pace.clock(sum(pace.section_seconds("micro")["04_grpo"].values()))
    text = plan.plan_text(get_profile("micro"), {**LARGE, "gpu": None, "gpu_bytes": None})
    assert "on the CPU" in text and f"04 {time}" in text and "warning" not in text and "download" not in text
    assert "not measured" in plan.plan_text(get_profile("smoke"), LARGE)
    assert any("free memory" in line for line in plan.warnings(get_profile("micro"), {**NOTHING, "ram_bytes": 5e8}))


def test_this_machine_has_memory_and_a_disk():
    found = plan.this_machine(get_profile("micro"))
    assert found["gpu"] is None and found["disk_bytes"] > 0 and found["ram_bytes"] > 1e8
    assert set(found) == set(LARGE)
    assert bool(plan.this_machine(get_profile("paper"))["gpu"]) == torch.cuda.is_available()


def test_unknown_names_are_one_sentence():
    with pytest.raises(ValueError, match="There is no profile 'huge'; choose one of"):
        get_profile("huge")
    with pytest.raises(ArtefactError, match="There is no configuration of some/model to plan with; known are"):
        plan.plan(replace(get_profile("paper"), student="some/model"), LARGE)


def test_a_plan_is_made_without_loading_torch():
    code = ("import sys; from ivt_utils import plan; from ivt_utils.profiles import get_profile; "
            "plan.plan_text(get_profile('micro')); plan.plan_text(get_profile('paper'), {}|plan.this_machine("
            "get_profile('micro'))); print('torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_every_student_of_a_profile_has_a_configuration():
    for profile in PROFILES.values():
        assert memory.configuration(profile)["text_config"]["hidden_size"]
    for name in memory.CONFIGURATIONS.values():
        assert json.loads((ROOT / "data" / "qwen3vl" / name).read_text())["student"] in memory.CONFIGURATIONS
