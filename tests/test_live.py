"""The students in a web page: their networks say what PyTorch says, and the page does what the package does."""

import functools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ivt_utils import cli, protocol
from ivt_utils.course import live, live_networks
from ivt_utils.loop import evaluate
from ivt_utils.methods import METHODS
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.profiles import get_profile
from ivt_utils.records import load_split
from ivt_utils.runtime.files import ROOT, ArtefactError
from ivt_utils.runtime.store import find_reference
from ivt_utils.student import load_student, read_chats

EXPORT = "the extra live is not installed: .venv/bin/pip install -e '.[live]'"
PROFILE = get_profile("micro")
SHOTS = ROOT / "build" / "screenshots"


@pytest.fixture(scope="module")
def val():
    return load_split(PROFILE, "val")


@functools.cache
def student_of(name: str):
    torch.set_num_threads(1)
    adapter = METHODS[name].adapter
    return load_student(PROFILE, adapter and find_reference(f"adapters/{adapter}"))


def some_box(chance: random.Random):
    """A box of any size, often thinner than the edge that is drawn around it; sometimes none."""
    if chance.random() < 0.2:
        return None
    x1, y1 = (chance.randint(0, 999) for _ in range(2))
    x2, y2 = (min(1000, low + chance.choice((1, 5, 10, 20, 30, 200, 1000))) for low in (x1, y1))
    return x1, y1, x2, y2


def as_bytes(image) -> np.ndarray:
    return np.array(image.convert("RGBA"))


# ------------------------------------------------------------------------------------------------ the networks
def test_the_eyes_draw_prepare_and_see_as_the_package_does(val):
    student, chance = student_of("base_ivt"), random.Random(0)
    network = live_networks.Eyes(student, 192, 192).eval()
    with torch.inference_mode():
        for record in val.select(range(100)):
            image, box = load_image(record["image"]), some_box(chance)
            drawn = draw_box(image, box)
            shown, features = network(torch.from_numpy(as_bytes(image)), torch.tensor(box or [0] * 4))
            assert np.array_equal(shown, as_bytes(drawn)), box
            inputs = student.processor.image_processor(images=[drawn], return_tensors="pt")
            seen = student.model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
            assert torch.allclose(features, seen, atol=1e-4), box


def test_the_reader_reads_a_chat_of_several_images_as_the_package_does(val):
    student = student_of("base_ivt")
    records = val.select(range(3))
    rollouts = evaluate(student, records, PROFILE)
    eyes, reader = (kind(student, 192, 192).eval() for kind in (live_networks.Eyes, live_networks.Reader))
    text = student.model.config.text_config
    nothing = torch.zeros(text.num_hidden_layers, 2, text.num_key_value_heads, 0, text.head_dim)
    for record, rollout in zip(records, rollouts, strict=True):
        image = load_image(record["image"])
        chat = protocol.transcript(image, record["expression"], rollout["steps"], draw_box)
        inputs = read_chats(student, [chat])
        boxes = [None, *(step["box"] for step in rollout["steps"][:-1])]
        with torch.inference_mode():
            wanted = student.model(**inputs).logits[0, -1]
            pixels = torch.from_numpy(as_bytes(image))
            features = torch.cat([eyes(pixels, torch.tensor(box or [0] * 4))[1] for box in boxes])
            tokens, place = inputs["input_ids"][0], torch.tensor([0])
            whole = reader(tokens, features, place, nothing)[0]
            _, place, past = reader(tokens[:-9], features, place, nothing)  # then goes on behind the last image
            rest = reader(tokens[-9:], features[:1], place, past)[0]
        assert torch.allclose(whole, wanted, atol=1e-3) and torch.allclose(rest, wanted, atol=1e-3)


@pytest.fixture(scope="module")
def built(slow, tmp_path_factory):
    """The folder of `ivt build live`, made once."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=EXPORT)
    if shutil.which("npm") is None:
        pytest.skip("npm, which brings the browser's runtime, is not on this machine")
    return live.build_live(tmp_path_factory.mktemp("live") / "live")


def test_all_parts_together_are_at_most_25_mb(built):
    names = {path.name for path in built.iterdir()}
    assert names == {live.EYES, live.WORDS, *live.RUNTIME_FILES, *(f"{name}.onnx" for name in live.STUDENTS)}
    assert sum(path.stat().st_size for path in built.iterdir()) <= 25e6


def onnx_answers(built, name, records, rollouts):
    """Yield (answer by the networks, answer of the rollout) for every step, after the rollout's own chat."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    eyes, reader = (onnxruntime.InferenceSession(built / file, options) for file in (live.EYES, f"{name}.onnx"))
    student = student_of(name)
    tokenizer, text = student.processor.tokenizer, student.model.config.text_config
    for record, rollout in zip(records, rollouts, strict=True):
        image = load_image(record["image"])
        chat, features = [protocol.question(image, record["expression"])], []
        for count, step in enumerate(rollout["steps"]):
            box = rollout["steps"][count - 1]["box"] if count else None
            if count:
                answered = protocol.answer(rollout["steps"][count - 1]["text"])
                chat += [answered, protocol.feedback(draw_box(image, box), box)]
            picture = {"picture": as_bytes(image), "box": np.array(box or [0] * 4, dtype=np.int32)}
            features.append(eyes.run(["features"], picture)[0])
            tokens, said = read_chats(student, [chat])["input_ids"][0].numpy(), []
            place = np.array([0], dtype=np.int32)
            past = np.zeros((text.num_hidden_layers, 2, text.num_key_value_heads, 0, text.head_dim), dtype=np.float32)
            while len(said) < PROFILE.max_new_tokens:
                read = {"tokens": np.int32(tokens), "features": np.concatenate(features), "place": place, "past": past}
                logits, place, past = reader.run(None, read)
                if (token := int(logits.argmax())) == tokenizer.eos_token_id:
                    break
                said.append(token)
                tokens = [token]
            yield tokenizer.decode(said, skip_special_tokens=True), step["text"]


@pytest.mark.parametrize("name", live.STUDENTS)
def test_in_16_bits_at_least_99_of_100_answers_of_three_turns_are_the_same(built, val, name):
    records = val.select(range(170))
    rollouts = evaluate(student_of(name), records, PROFILE)
    answers = [*onnx_answers(built, name, records, rollouts)]
    same = sum(ours == theirs for ours, theirs in answers)
    print(f"{name}: {same} of {len(answers)} answers are the same")
    assert len(answers) >= 500 and same >= 0.99 * len(answers)


# ------------------------------------------------------------------------------------------------ bad surroundings
def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(live, "installed", lambda name: None)
    assert cli.main(["build", "live"]) == 2
    assert capsys.readouterr().err == "onnx and onnxscript are missing: pip install -e '.[live]'\n"


def test_without_npm_or_with_another_package_a_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtefactError, match="npm could not fetch onnxruntime-web@"):
        live.fetch_runtime(tmp_path)

    def pack(command, **options):
        (Path(command[-1]) / "runtime.tgz").write_bytes(b"something else")

    monkeypatch.setattr(live.subprocess, "run", pack)
    with pytest.raises(ArtefactError, match="another onnxruntime-web@"):
        live.fetch_runtime(tmp_path)
    assert not [*tmp_path.iterdir()]
