"""NF4 itself, on the CPU: a small Qwen3-VL is loaded in 4 bits, warmed up with SFT and trained with GRPO."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ivt_utils import grpo, sft, student
from ivt_utils.harvest import trajectory
from ivt_utils.loop import evaluate
from ivt_utils.runtime.files import DATA

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: .venv/bin/pip install -e '.[gpu]'")


@pytest.fixture
def small(tiny_profile, tmp_path, monkeypatch):
    """A profile whose student is taken for one of the Hub: the shipped one, by a path from the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA / "student", tmp_path / "small" / "student")
    bits = {"load_in_4bit": True, "eyes_in_16bit": True, "student_revision": 40 * "0"}
    return replace(tiny_profile, student="small/student", **bits)


def in_4_bits(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def test_every_linear_map_of_the_language_model_is_in_4_bits_and_nothing_else(small, records):
    made = student.load_student(small)
    linear = {name for name, module in made.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert in_4_bits(made.model) == {name for name in linear if name.startswith("model.language_model.")}
    assert len(in_4_bits(made.model)) == 7 * made.model.config.text_config.num_hidden_layers
    assert all(isinstance(made.model.get_submodule(name).weight, bnb.nn.Params4bit) for name in in_4_bits(made.model))
    others = [weight for name, weight in made.model.named_parameters() if "visual" in name or "lm_head" in name]
    assert {weight.dtype for weight in others} == {torch.float32}
    whole = student.load_student(replace(small, load_in_4bit=False))
    words = torch.arange(5, 25)[None]
    with torch.inference_mode():
        exact, coarse = (s.model(input_ids=words).logits.log_softmax(-1) for s in (whole, made))
    assert 1e-4 < (exact - coarse).abs().mean() < 1
    assert sum(r["steps"][0]["box"] is not None for r in evaluate(made, records, small, turns=0)) >= 4
    assert any("visual" in name for name in in_4_bits(student.load_student(replace(small, eyes_in_16bit=False)).model))


def test_gradients_are_those_of_the_weights_that_4_bits_stand_for(small, records):
    """After an evaluation as well, in which bitsandbytes may pack the weights anew for the processor."""
    from peft import get_peft_model

    grads = {}
    for kind in ("packed", "unpacked"):
        made = student.load_student(small)
        evaluate(made, records[:2], small, turns=0)
        if kind == "unpacked":
            made.model.dequantize()
        torch.manual_seed(0)
        model = get_peft_model(made.model, student.lora(small)).train()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.02)
        words = torch.arange(5, 25)[None]
        model(input_ids=words, labels=words).loss.backward()
        grads[kind] = torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])
    assert grads["packed"].abs().max() > 1e-3
    assert torch.allclose(grads["packed"], grads["unpacked"], atol=1e-3 * float(grads["unpacked"].abs().max()))


@pytest.mark.slow
def test_sft_and_grpo_on_4_bit_weights_with_the_reference_that_was_the_start(small, records, tmp_path, monkeypatch):
    base = student.load_student(small)
    codes = {name: base.model.get_submodule(name).weight.detach().clone() for name in in_4_bits(base.model)}
    wrong = evaluate(base, records, small, turns=0)
    dataset = sft.trajectories_dataset(
        records, [trajectory(r, small.turns, small.grid) for r in wrong if r["steps"][0]["box"]]
    )
    log = sft.train_sft(base, dataset, tmp_path / "sft", small, seed=0, steps=2)
    start = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert len(log) == 2 and {weight.dtype for weight in start.values()} == {torch.float32}
    assert any(weight.any() for name, weight in start.items() if "lora_B" in name)

    with monkeypatch.context() as card:  # frozen, it is in the type that the student computes in
        card.setattr(student.hardware, "precision", lambda: "bfloat16")
        frozen = dict(student.load_student(small, tmp_path / "sft").model.named_parameters())
    for name, weight in start.items():
        assert torch.equal(frozen[name.removesuffix("weight") + "default.weight"], weight.bfloat16()), name

    policy = student.load_student(small, tmp_path / "sft", trainable=True)
    log = grpo.train_grpo(policy, grpo.prompts_dataset(records), tmp_path / "grpo", small, seed=0, steps=3)
    weights = dict(policy.model.named_parameters())
    kept = {name for name in weights if ".ref." in name}
    assert len(kept) == len(start) and not any(weights[name].requires_grad for name in kept)
    for name, weight in start.items():
        path = name.removesuffix(".weight")
        assert torch.equal(weights[f"{path}.ref.weight"], weight), name
    learned = load_file(tmp_path / "grpo" / "adapter_model.safetensors")
    assert any(not torch.equal(learned[name], start[name]) for name in start)
    assert log[0]["kl"] == 0 and log[-1]["kl"] > 0
    for name, code in codes.items():
        assert torch.equal(policy.model.get_submodule(f"base_model.model.{name}.base_layer").weight, code), name
