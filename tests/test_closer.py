"""The closer look: the geometry of a part of the image, the loop that asks about it, what is learned, and its table."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from ivt_utils import cli, closer, loop, protocol
from ivt_utils.boxes import from_view, iou, parse_answer, snap, to_view, valid, view
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import closer_look
from ivt_utils.profiles import get_profile
from ivt_utils.show.reading import closer_from
from ivt_utils.student import bound_images

LEAST = 200  # the smallest side of a closer look

COORDINATE = st.integers(0, 1000)
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE).map(snap)


@given(BOX, st.floats(1, 8))
def test_a_view_lies_in_the_image_and_holds_its_box(box, zoom):
    part = x1, y1, x2, y2 = view(box, zoom, LEAST)
    assert valid(part) and x2 - x1 == y2 - y1
    assert x1 <= box[0] and y1 <= box[1] and box[2] <= x2 and box[3] <= y2
    wanted = zoom * max(box[2] - box[0], box[3] - box[1])
    assert x2 - x1 == pytest.approx(min(1000, max(200, wanted)), abs=0.5)


@given(BOX, BOX, st.floats(1.5, 8))
def test_a_box_goes_into_a_view_and_comes_back(around, box, zoom):
    part = view(around, zoom, LEAST)
    assume(all(low <= v <= high for v, low, high in zip(box, part[:2] * 2, part[2:] * 2, strict=True)))
    assert max(abs(a - b) for a, b in zip(from_view(to_view(box, part), part), box, strict=True)) <= 1


def test_views_by_hand():
    assert view((400, 300, 500, 400), 4, LEAST) == (250, 150, 650, 550)
    assert view((0, 900, 100, 1000), 4, LEAST) == (0, 600, 400, 1000)  # moved, to stay within the image
    assert view((100, 100, 400, 200), 4, LEAST) == view(None, 4, LEAST) == (0, 0, 1000, 1000)
    assert view((500, 500, 510, 510), 4, LEAST) == (405, 405, 605, 605)  # never fewer than a fifth of the image
    assert from_view((500, 0, 1000, 500), (250, 150, 650, 550)) == (450, 150, 650, 350)
    assert to_view((450, 150, 650, 350), (250, 150, 650, 550)) == (500, 0, 1000, 500)
    assert to_view((0, 0, 450, 350), (250, 150, 650, 550), grid=10) == (0, 0, 500, 500)  # clipped
    with pytest.raises(ValueError, match="zoom 0.5 is below 1"):
        view((0, 0, 10, 10), 0.5, LEAST)


def difference_of(a, b) -> float:
    return sum(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) / len(a.tobytes())


def test_a_closer_look_is_that_part_at_the_size_of_the_image(records):
    image = records[0]["image"]
    seen = closer_look(image, (400, 300, 500, 400), 4, LEAST)
    left, top, right, bottom = (round(v * image.width / 1000) for v in (250, 150, 650, 550))
    wanted = image.crop((left, top, right, bottom)).resize(image.size)
    difference = difference_of(seen, wanted)
    assert seen.size == image.size and difference < 12 and difference < difference_of(image, wanted) / 2
    assert closer_look(image, None, 4, LEAST).tobytes() == image.tobytes()


def test_the_loop_asks_afresh_about_the_part_and_puts_the_answer_back(monkeypatch, records):
    asked, said = [], [protocol.answer_text(box) for box in ((400, 300, 500, 400), (500, 0, 1000, 500))]
    texts = iter([*said, "?"])

    def generate(student, chats, *_):
        asked.append([list(chat) for chat in chats])
        return [next(texts)] * len(chats)

    monkeypatch.setattr(loop, "generate", generate)
    turn = closer.closer_turn(4, LEAST)
    rollouts = loop.evaluate("no student", records, get_profile("micro"), turns=2, next_turn=turn)
    for number, (record, rollout) in enumerate(zip(records, rollouts, strict=True)):
        boxes = [step["box"] for step in rollout["steps"]]
        assert boxes == [(400, 300, 500, 400), (450, 150, 650, 350), None]
        seen = [record["image"], *(closer_look(record["image"], box, 4, LEAST) for box in boxes[:2])]
        for turn, image in enumerate(seen):
            (message,) = asked[turn][number]
            wanted = protocol.question(image, record["expression"])
            assert message["content"][1:] == wanted["content"][1:] and message["role"] == "user"
            assert message["content"][0]["image"].tobytes() == image.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("as_seen", [False, True])
def test_a_look_at_a_given_part_shows_new_pixels_or_none(monkeypatch, tiny_student, records, as_seen):
    asked = []

    def generate(student, chats, *_):
        asked.extend(chats)
        return [protocol.answer_text((500, 0, 1000, 500)), *["?"] * (len(chats) - 1)]

    monkeypatch.setattr(loop, "generate", generate)
    boxes = [(400, 300, 500, 400), None, *[(0, 0, 90, 90)] * (len(records) - 2)]
    first = [answer((1, 2, 3, 4), (0, 0, 9, 9), "a-0") | {"id": record["id"]} for record in records]
    found = closer.look_at(tiny_student, records, first, boxes, get_profile("micro"), as_seen=as_seen)
    assert [len(rollout["steps"]) for rollout in found] == [2] * len(records) and len(first[0]["steps"]) == 1
    assert [rollout["steps"][1]["box"] for rollout in found] == [(450, 150, 650, 350), *[None] * (len(records) - 1)]
    size = closer.seen_size(tiny_student, records[0]["image"])
    for (question,), record, box in zip(asked, records, boxes, strict=True):
        source = record["image"].resize(size, Image.Resampling.BICUBIC) if as_seen else record["image"]
        assert question["content"][0]["image"].tobytes() == closer_look(source, box, 4, LEAST).tobytes()


def test_an_image_is_seen_at_the_size_of_its_patches(tiny_student):
    for student, most, seen in ((tiny_student, 0, 96), (tiny_student, 2 * 96 * 96, 128)):
        processor = copy.deepcopy(student.processor)
        bound_images(processor, most)
        image = Image.new("RGB", (192, 192))
        assert closer.seen_size(replace(student, processor=processor), image) == (seen, seen)


def answer(box, truth, name="a-0"):
    text = protocol.answer_text(box) if box else "nothing"
    return {
        "id": name,
        "image_id": name.split("-")[0],
        "subset": "s",
        "expression": "the star",
        "truth": list(truth),
        "steps": [{"text": text, "box": box}],
    }


def test_what_is_learnt_keeps_first_answers_and_tells_the_truth_where_it_is_seen():
    near, far = (answer((400, 300, 500, 400), truth) for truth in ((440, 330, 560, 450), (0, 0, 90, 90)))
    none = answer(None, (440, 330, 560, 450))
    rows = closer.examples([near, far, none], 4, LEAST, grid=10)
    assert [row["shown"] for row in rows] == [None, [400, 300, 500, 400], None]
    large = answer((100, 100, 350, 300), (120, 100, 400, 350))  # all of the image is looked at: no second question
    assert [row["shown"] for row in closer.examples([large], 4, LEAST, grid=10)] == [None]
    assert rows[0]["text"] == near["steps"][0]["text"] and rows[2]["text"] == far["steps"][0]["text"]
    learned = from_view(parse_answer(rows[1]["text"]), view((400, 300, 500, 400), 4, LEAST))
    assert iou(learned, near["truth"]) > 0.9
    (rival,) = closer.first_examples([near], grid=10)
    assert rival["shown"] is None and parse_answer(rival["text"]) == (440, 330, 560, 450)


def test_an_example_is_one_question_and_one_answer(records):
    row = {"id": records[2]["id"], "expression": "the star", "text": "{}"}
    rows = [{**row, "shown": shown} for shown in (None, [400, 300, 500, 400])]
    whole, part = closer.examples_dataset(records, rows, 4, LEAST)
    assert [message["role"] for message in part["messages"]] == ["user", "assistant"]
    assert part["messages"][1]["content"][0]["text"] == "{}"
    assert whole["images"][0].tobytes() == records[2]["image"].tobytes()
    assert part["images"][0].tobytes() == closer_look(records[2]["image"], (400, 300, 500, 400), 4, LEAST).tobytes()


TRUTH, WRONG = (100, 100, 300, 300), (600, 600, 900, 900)


def looks(right, steps):
    boxes = [[TRUTH if f(i) else WRONG for f in right[:steps]] for i in range(40)]
    return [
        answer(None, TRUTH, f"{i}-0") | {"steps": [{"text": "", "box": box} for box in row]}
        for i, row in enumerate(boxes)
    ]


def table():
    def even(i):
        return i % 2 == 0

    def most(i):
        return i % 4 > 0

    def always(i):
        return True

    return {
        ("untrained", None): looks([even, most], 2),
        ("seed", 0): looks([even, always], 2),
        ("first", 0): looks([most], 1),
        ("sampled", 0): looks([even, most, most], 3),
        ("seed", 1): looks([even, most], 2),
        ("first", 1): looks([most], 1),
        ("sampled", 1): looks([even] * 3, 3),
        **{(name, seed): looks([even, most], 2) for name in closer.VIEWS for seed in (0, 1)},
        **{(name, seed): looks([always], 1) for name in closer.SHARPER for seed in (0, 1)},
    }


def test_the_table_has_each_seed_and_their_mean():
    rows = closer.closer_rows(table(), Resampling(0, 200))
    found = {(row["name"], row["seed"]): row for row in rows}
    assert len(found) == len(rows) == 3 * (11 + len(closer.COMPARISONS))
    acc = {key: row["acc50"]["value"] for key, row in found.items()}
    assert acc["closer look", 0] == 1 and acc["closer look", 1] == 0.75 and acc["closer look", "mean"] == 0.875
    assert acc["closer look - base, single shot", "mean"] == pytest.approx(0.375)
    assert acc["closer look - first answer", 1] == 0.25 and acc[closer.SAMPLED, 0] == 0.75
    cell, alone = (found["closer look - first answer", seed]["acc50"] for seed in ("mean", 0))
    assert cell["low"] < alone["low"] < cell["value"] < cell["high"] and cell["n"] == 40  # two trainings say little
    assert found["closer look", "mean"]["seeds"] == [0, 1] and found["closer look", 1]["seeds"] == [1]
    assert acc[closer.TAUGHT, "mean"] == 0.75 and acc["closer look, untrained - base, single shot", 0] == 0.25
    assert [acc["closer look - closer look, untrained", seed] for seed in (0, 1)] == [0.25, 0]
    assert acc[f"closer look - {closer.SEEN}", 0] == 0.25 == acc[f"{closer.SEEN} - {closer.FIRST}", 0]
    assert acc[f"closer look - {closer.WHOLE}", "mean"] == -0.125 and found[closer.WHOLE, 0]["answers"] == 1
    assert found["closer look", 0]["answers"] == found[closer.SEEN, 1]["answers"] == 2
    assert found[closer.SAMPLED, 0]["answers"] == 3
    assert json.loads(json.dumps(rows)) == rows


def test_a_table_without_the_controls_is_what_it_was():
    answers = {name: found for name, found in table().items() if name[0] not in (*closer.VIEWS, *closer.SHARPER)}
    names = {row["name"] for row in closer.closer_rows(answers, Resampling(0, 50))}
    assert closer.SEEN not in str(names) and "closer look - closer look, untrained" in names and len(names) == 13
    del answers["untrained", None]
    assert closer.closer_rows(answers, Resampling(0, 50)) == []


def test_a_seed_that_is_not_whole_is_left_out_and_other_samples_are_refused():
    answers = table()
    del answers["sampled", 1]
    assert {row["seed"] for row in closer.closer_rows(answers, Resampling(0, 50))} == {0, "mean"}
    assert closer.closer_rows({}, Resampling(0, 50)) == []
    answers["first", 0] = answers["first", 0][1:]
    with pytest.raises(ValueError, match="different samples"):
        closer.closer_rows(answers, Resampling(0, 50))


@pytest.mark.slow
def test_the_command_trains_scores_resumes_and_reports(tmp_path, capsys):
    command = ["closer", "--profile", "smoke", "--seeds", "1", "--run-dir", str(tmp_path)]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "closer look - first answer" in first and f" {get_profile('smoke').test}\n" in first
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()} == stamps
    assert cli.main([*command, "--split", "val"]) == 0
    assert "val split" in capsys.readouterr().out
    adapters = list(tmp_path.glob("adapters/*/adapter_model.safetensors"))
    assert len(adapters) == 4  # the closer look, and three that learn the truth at first sight
    assert all(path.stat().st_mtime_ns == stamps[path] for path in adapters)  # none was trained twice
    lost = tmp_path / "rollouts" / "closer_test_first1.jsonl"
    lost.unlink()
    assert closer_from(tmp_path, Resampling(0, 50)) == []
    assert cli.main(command) == 0 and lost.exists()
    lost.write_text("{")
    assert cli.main(command) == 2 and "damaged" in capsys.readouterr().err


def test_other_values_want_another_folder(tmp_path, capsys, monkeypatch):
    assert cli.main(["closer", "--profile", "smoke", "--set", "zoom=3"]) == 2
    assert cli.main(["closer", "--profile", "smoke", "--set", "sft_lr=3", "--run-dir", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.count("--set takes zoom=") == 2 and not (tmp_path / "a").exists()
    used = []
    monkeypatch.setattr(closer, "run_closer", lambda run, seeds, train, records, split: used.append(run.profile.zoom))
    command = ["closer", "--profile", "smoke", "--seeds", "0", "--set", "zoom=3", "--run-dir", str(tmp_path)]
    assert cli.main([*command, "--split", "val"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["values"]["zoom"] == 3 and used == [3]
