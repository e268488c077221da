"""SFT: what the adapter reaches, what the loss covers, what the trainer is shown, and a stop on the way."""

import dataclasses
import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ivt_utils import protocol, sft, student
from ivt_utils.harvest import trajectory
from ivt_utils.micro import model as micro
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.profiles import PROFILES
from ivt_utils.runtime.files import ROOT, ArtefactError, read_json


def errors(records) -> list[dict]:
    """A rollout with a wrong first box for each record."""
    box = (100, 200, 300, 500)
    return [
        {
            **{k: r[k] for k in ("id", "image_id", "subset", "expression")},
            "truth": r["bbox"],
            "steps": [{"text": protocol.answer_text(box), "box": box}],
        }
        for r in records
    ]


@pytest.fixture(scope="module")
def dataset(records):
    return sft.trajectories_dataset(records, [trajectory(error, 2, micro.GRID) for error in errors(records[:4])])


# --- data


def test_a_row_is_the_chat_of_a_trajectory_with_its_images(dataset, records):
    assert len(dataset) == 4 and list(dataset[0]) == ["messages", "images"]
    for row, record, error in zip(dataset, records, errors(records), strict=False):
        steps = trajectory(error, 2, micro.GRID)["steps"]
        chat = protocol.transcript(record["image"], record["expression"], steps, draw_box)
        assert [m["role"] for m in row["messages"]] == [m["role"] for m in chat] == ["user", "assistant"] * 3
        for message, wanted in zip(row["messages"], chat, strict=True):
            assert [(p["type"], p["text"]) for p in message["content"]] == [
                (p["type"], p.get("text")) for p in wanted["content"]
            ]
        shown = [part["image"] for message in chat for part in message["content"] if "image" in part]
        assert [image.tobytes() for image in row["images"]] == [image.tobytes() for image in shown]


def test_the_style_of_the_boxes_is_passed_on(records):
    made = [trajectory(error, 1, micro.GRID) for error in errors(records[:1])]
    for style in ("outline", "none"):
        shown = sft.trajectories_dataset(records, made, style)[0]["images"][1]
        assert shown.tobytes() == draw_box(records[0]["image"], made[0]["steps"][0]["box"], style).tobytes()


def test_a_picture_from_a_jpeg_reaches_the_trainer_as_the_loop_shows_it(records):
    """Encoding it a second time would train on other pixels than the loop evaluates on."""
    buffer = io.BytesIO()
    records[0]["image"].save(buffer, "JPEG", quality=85)
    picture = Image.open(buffer)  # as a data set of JPEG bytes gives it
    record = {**records[0], "image": picture}
    row = sft.trajectories_dataset([record], [trajectory(errors([record])[0], 1, micro.GRID)])[0]
    assert row["images"][0].convert("RGB").tobytes() == load_image(picture).tobytes()


# --- the adapter


def test_lora_reaches_every_projection_of_the_language_model_and_nothing_else(fresh_student, tiny_profile):
    from peft import get_peft_model

    layers = len(fresh_student.model.model.language_model.layers)
    model = get_peft_model(fresh_student.model, student.lora(tiny_profile))
    reached = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert all(".language_model.layers." in name for name in reached) and not any("visual" in name for name in reached)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rsplit(".", 1)[1] for name in reached} == kinds and len(reached) == 7 * layers
    ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {tiny_profile.lora_rank} and model.peft_config["default"].lora_alpha == tiny_profile.lora_alpha


# --- the trainer


@pytest.mark.parametrize("name", PROFILES)
def test_the_lines_of_the_notebook_build_what_the_package_trains_with(name, monkeypatch, tmp_path):
    """Every setting, whether it is written there or left to its default."""
    cells = read_json(ROOT / "notebooks" / "03_sft_warmup.ipynb")["cells"]
    (lines,) = ["".join(c["source"]) for c in cells if "def sft_trainer(" in "".join(c["source"])]
    monkeypatch.setattr("trl.SFTTrainer", dict)
    profile, shown = PROFILES[name], {"profile": PROFILES[name], "SEED": 3}
    exec(lines, shown)
    call = SimpleNamespace(model=object(), processor=object()), object(), tmp_path, profile, 3
    taught, ours = shown["sft_trainer"](*call), sft.sft_trainer(*call)
    for key in ("args", "peft_config"):
        taught[key], ours[key] = (dataclasses.asdict(built[key]) for built in (taught, ours))
    assert taught == ours
    assert (taught["args"]["learning_rate"], taught["peft_config"]["r"]) == (profile.sft_lr, profile.lora_rank)


def test_a_training_is_that_of_the_trainer(monkeypatch, tmp_path, tiny_profile):
    """`train_sft` changes no setting of `sft_trainer`'s; with `steps`, that number alone is another one."""
    monkeypatch.setattr("trl.SFTTrainer", dict)
    finished = []
    monkeypatch.setattr(sft, "finish", lambda *call: finished.append(call))
    call = SimpleNamespace(model=object(), processor=object()), object(), tmp_path, tiny_profile, 3
    for steps in (None, 7):
        sft.train_sft(*call, steps)
        trainer, *rest = finished.pop()
        assert rest == [tmp_path, tiny_profile.student]
        expected, trained = (dataclasses.asdict(built["args"]) for built in (sft.sft_trainer(*call), trainer))
        assert trained == expected | {"max_steps": steps or -1}


@pytest.fixture(scope="module")
def recorded():
    """TRL's SFTTrainer, kept when it is made, and stopped as by Ctrl-C before step `stop`."""
    import trl

    class Recorded(trl.SFTTrainer):
        made, stop = [], None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.made.append(self)

        def training_step(self, *args, **kwargs):
            if self.state.global_step == self.stop:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "SFTTrainer", Recorded)
        yield Recorded


def train(processor, dataset, folder, profile):
    """Train a new copy of the student in `folder`; return the log and the base weights after it."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    model = micro.build_micro(processor, seed=0)
    log = sft.train_sft(student.Student(model, processor, micro.GRID), dataset, folder, profile, 0, steps=4)
    return log, {name: p.detach() for name, p in model.named_parameters() if "lora_" not in name}


@pytest.fixture(scope="module")
def trained(processor, dataset, tiny_profile, recorded, tmp_path_factory):
    """A training of four steps, each with two of four trajectories."""
    folder = tmp_path_factory.mktemp("sft") / "whole"
    log, base = train(processor, dataset, folder, tiny_profile)
    adapter = load_file(folder / "adapter_model.safetensors")
    return SimpleNamespace(folder=folder, log=log, base=base, adapter=adapter, trainer=recorded.made[0])


def test_the_adapter_learns_and_the_base_weights_stay(trained, processor):
    assert trained.adapter and all("language_model" in name and "lora_" in name for name in trained.adapter)
    assert any(value.abs().max() > 0 for name, value in trained.adapter.items() if "lora_B" in name)
    before = dict(micro.build_micro(processor, seed=0).named_parameters())
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in trained.base.items()}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_short_training_has_a_log_as_well(trained):
    assert trained.log and trained.log == sft.read_log(trained.folder)
    assert all(row["loss"] > 0 and row["step"] >= 1 for row in trained.log)


def test_the_saved_adapter_names_the_student_and_no_path(trained, tiny_profile):
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_profile.student
    assert str(trained.folder.parent) not in json.dumps(config)


def test_the_trainer_learns_the_answers_and_their_ends_and_nothing_else(trained, dataset, processor):
    batch = trained.trainer.data_collator([dataset[0], dataset[1]])
    for ids, labels, row in zip(batch["input_ids"], batch["labels"].tolist(), dataset, strict=False):
        spans = [list(group) for learned, group in itertools.groupby(labels, lambda v: v != -100) if learned]
        answers = [m["content"][0]["text"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert [processor.tokenizer.decode(span) for span in spans] == answers
        assert all(label in (-100, token) for label, token in zip(labels, ids.tolist(), strict=True))


def test_no_trajectory_is_cut_and_every_sample_is_seen(trained):
    assert trained.trainer.args.max_length is None and trained.trainer.state.global_step == 4


@pytest.mark.slow
def test_ctrl_c_and_the_same_call_again_end_on_the_same_adapter(
    trained, processor, dataset, tiny_profile, recorded, tmp_path, monkeypatch
):
    folder = tmp_path / "stopped"
    monkeypatch.setattr(recorded, "stop", 2)
    with pytest.raises(KeyboardInterrupt):
        train(processor, dataset, folder, tiny_profile)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "adapter_model.safetensors").exists()
    monkeypatch.setattr(recorded, "stop", None)
    train(processor, dataset, folder, tiny_profile)
    again = load_file(folder / "adapter_model.safetensors")
    assert again.keys() == trained.adapter.keys()
    assert all(torch.allclose(again[name], trained.adapter[name], atol=1e-6) for name in again)


@pytest.fixture
def stub():
    """A trainer that only notes where it resumes."""

    def save(folder, **_):
        with open(f"{folder}/adapter_config.json", "w") as file:
            json.dump({"base_model_name_or_path": "/home/me/somewhere"}, file)

    noted = []
    state = SimpleNamespace(log_history=[{"loss": 1.0, "step": 1}, {"train_runtime": 2.0}])
    trainer = SimpleNamespace(
        noted=noted,
        state=state,
        args=SimpleNamespace(max_steps=-1),
        model=SimpleNamespace(save_pretrained=save, named_parameters=list),
        train=lambda resume_from_checkpoint: noted.append(resume_from_checkpoint),
        add_callback=lambda _: None,
        remove_callback=lambda _: None,
    )
    return trainer


def checkpoint(folder, step, whole=True, of=99):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_text("")
    if whole:
        state = {"global_step": step, "max_steps": of}
        (path / "trainer_state.json").write_text(json.dumps(state))  # the trainer writes it last
    return str(path)


def test_a_first_training_starts_at_the_beginning(stub, tmp_path):
    log = sft.finish(stub, tmp_path, "data/student")
    assert stub.noted in ([None], [False]) and log == [{"loss": 1.0, "step": 1}] == sft.read_log(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "data/student"


def test_a_training_resumes_from_the_last_checkpoint(stub, tmp_path):
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)
    sft.finish(stub, tmp_path, "data/student")
    assert [str(where) for where in stub.noted] == [last]


def test_a_checkpoint_that_a_kill_left_half_written_is_not_used(stub, tmp_path):
    last = checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 40, whole=False)
    sft.finish(stub, tmp_path, "data/student")
    assert [str(where) for where in stub.noted] == [last]


def test_an_interrupted_training_goes_on_with_as_many_steps_only(stub, tmp_path):
    checkpoint(tmp_path, 20, of=100)
    stub.args.max_steps = 30
    with pytest.raises(ArtefactError, match="holds a training of 100 steps that was interrupted, and now 30"):
        sft.finish(stub, tmp_path, "data/student")
    assert not stub.noted and not (tmp_path / sft.LOG).exists()


def test_a_training_that_lacks_its_adapter_alone_is_not_trained_again(stub, tmp_path):
    last = checkpoint(tmp_path, 30, of=30)
    stub._load_from_checkpoint = stub.noted.append
    sft.finish(stub, tmp_path, "data/student")
    assert stub.noted == [last] and stub.state.global_step == 30


def test_a_half_written_first_checkpoint_is_as_good_as_none(stub, tmp_path):
    checkpoint(tmp_path, 20, whole=False)
    sft.finish(stub, tmp_path, "data/student")
    assert stub.noted in ([None], [False])


def test_an_adapter_that_was_rounded_on_the_way_is_trained_as_it_was(stub, tmp_path):
    """TRL rounds the adapter of a 4-bit model to bfloat16; what was learned before comes back, in float32."""
    learned, frozen = torch.tensor([0.1234567]), torch.zeros(1, dtype=torch.bfloat16)
    rounded = torch.nn.Parameter(learned.bfloat16())
    stub.model.named_parameters = lambda: [("lora", rounded), ("base", torch.nn.Parameter(frozen, False))]
    sft.finish(stub, tmp_path, "data/student", {"lora": learned})
    assert rounded.dtype == torch.float32 and torch.equal(rounded.data, learned)
    fresh = torch.nn.Parameter(learned.bfloat16())
    stub.model.named_parameters = lambda: [("lora", fresh)]
    sft.finish(stub, tmp_path, "data/student")
    assert fresh.dtype == torch.float32


@pytest.mark.slow
def test_activations_may_be_checkpointed(trained, processor, dataset, tiny_profile, recorded, tmp_path, monkeypatch):
    """As on a GPU: less memory, and the same adapter."""
    real = sft.trainer_options
    monkeypatch.setattr(sft, "trainer_options", lambda *a: real(*a) | {"activation_checkpointing": True})
    train(processor, dataset, tmp_path / "checkpointed", tiny_profile)
    assert recorded.made[-1].args.activation_checkpointing and recorded.made[-1].model.is_activation_checkpointing
    again = load_file(tmp_path / "checkpointed" / "adapter_model.safetensors")
    assert all(torch.allclose(again[name], trained.adapter[name], atol=1e-5) for name in trained.adapter)
