"""A served student: a scripted HTTP server with the shipped micro student behind it, and `transformers serve`."""

import base64
import io
import json
import re
import shlex
import signal
import threading
import time
from dataclasses import replace

import pytest
from conftest import MICRO, PROJECT, completion, transformers_serve
from PIL import Image

from ivt_utils import loop, pipeline
from ivt_utils.cli import main
from ivt_utils.methods import METHODS
from ivt_utils.paper_scale import served
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ArtefactError, read_jsonl
from ivt_utils.runtime.store import Run
from ivt_utils.show.reading import results_from
from ivt_utils.show.tables import mirage_tables
from ivt_utils.student import load_student

PROFILE = replace(get_profile("smoke"), student_workers=4, student_timeout=20.0, batch_size=4)


@pytest.fixture(autouse=True)
def quickly(quick):
    """No server is asked for long."""


@pytest.fixture(scope="module")
def local():
    return load_student(PROFILE)


@pytest.fixture
def behind(local):
    """A script for the server: the local student's own answer to the chat of a request."""
    lock = threading.Lock()

    def answer(request, _=None):
        with lock:
            values = request["max_completion_tokens"], request["temperature"], request.get("seed", 0)
            return loop.generate(local, [chat_of(request)], *values)[0]

    return answer


def chat_of(request):
    """The chat of a request, with its images back in it."""

    def part(own):
        if own["type"] == "text":
            return own
        kind, data = own["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")}

    return [{"role": m["role"], "content": [part(own) for own in m["content"]]} for m in request["messages"]]


def student(server, tmp_path, profile=PROFILE):
    url = server if isinstance(server, str) else server.url
    return served.served_student(profile, base_url=url, model="m", cache=tmp_path / "cache")


def rollouts(student, records, **changes):
    return loop.evaluate(student, records, PROFILE, **changes)


def said_by(tmp_path, ask):
    """The sentence of the error in which `ask()` ends; it says how to go on."""
    with pytest.raises(ArtefactError) as stopped:
        ask()
    said = str(stopped.value)
    assert said.endswith(f"; what is finished is kept in {tmp_path / 'cache'}, and the same command goes on.")
    assert "\n" not in said and not re.search(r"[.!?] [A-Z]", said)
    return said


# ---------------------------------------------------------------------------------------------- good answers
def test_a_served_student_gives_the_rollouts_of_the_local_one(serve, behind, local, records, tmp_path):
    server = serve(behind)
    there = rollouts(student(server, tmp_path), records)
    assert there == rollouts(local, records)
    assert any(step["box"] for rollout in there for step in rollout["steps"])
    assert 2 <= server.most <= PROFILE.student_workers
    assert {request["temperature"] for request in server.asked} == {0.0} and "seed" not in server.asked[0]
    assert len(server.asked) == len(records) * (PROFILE.turns + 1)
    assert rollouts(student(server, tmp_path), records) == there
    assert len(server.asked) == len(records) * (PROFILE.turns + 1)  # each answer was kept


def test_images_arrive_as_they_are_and_parts_in_their_order(serve, records, tmp_path):
    server = serve(lambda request, n: '{"bbox_2d": [10, 20, 300, 400]}')
    asked = []
    ask = loop.feedback_turn()
    turn = replace(ask, ask=lambda *values: asked.append(ask.ask(*values)) or asked[-1])
    rollouts(student(server, tmp_path), records[:1], turns=1, next_turn=turn)
    meant, sent = asked[0], chat_of(server.asked[-1])
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    for mine, theirs in zip(meant, sent, strict=True):
        assert [part["type"] for part in mine["content"]] == [part["type"] for part in theirs["content"]]
        for one, other in zip(mine["content"], theirs["content"], strict=True):
            text = one["type"] == "text"
            assert one["text"] == other["text"] if text else one["image"].tobytes() == other["image"].tobytes()


def test_sampling_says_from_what_and_each_chat_has_its_own_seed(serve, records, tmp_path):
    server = serve(lambda request, n: f"{n}")
    rollouts(student(server, tmp_path), records[:4], turns=0, temperature=0.7, seed=100)
    assert sorted(request["seed"] for request in server.asked) == [100, 101, 102, 103]
    for request in server.asked:
        assert request["temperature"] == 0.7 and request["top_p"] == 1.0
        assert json.loads(request["generation_config"]) == {
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 0,
            "top_p": 1.0,
        }


def test_an_empty_text_is_an_answer_and_has_no_box(serve, records, tmp_path):
    there = rollouts(student(serve(lambda request, n: ""), tmp_path), records[:1])
    assert [step["box"] for step in there[0]["steps"]] == [None] * (PROFILE.turns + 1)


@pytest.mark.parametrize("size", [(1000, 700), (640, 480), (90, 130), (1300, 260)])
def test_an_image_is_sent_in_the_size_that_the_students_processor_gives_it(size):
    """So a server whose processor has the model's own, larger limit sees what the local student sees."""
    import torch
    from transformers import Qwen2VLImageProcessor

    from ivt_utils.paper_scale.plan import configuration

    paper = get_profile("paper")
    values = {k: v for k, v in configuration(paper)["image_processor"].items() if k != "image_processor_type"}
    noise = torch.randint(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise).resize(size)
    here = {**values, "size": {**values["size"], "longest_edge": paper.max_pixels}}
    meant = Qwen2VLImageProcessor(**here)(image, return_tensors="pt")
    there = Qwen2VLImageProcessor(**values)(served.shrunk(image, paper.max_pixels), return_tensors="pt")
    assert torch.equal(meant["image_grid_thw"], there["image_grid_thw"])
    assert torch.equal(meant["pixel_values"], there["pixel_values"])
    assert served.shrunk(image, 0) is image


# ---------------------------------------------------------------------------------------------- what goes wrong
def answer_with(**message):
    values = {"role": "assistant", "content": None, **message}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": values, "finish_reason": "stop"}]}).encode()


CALL = {"id": "1", "type": "function", "function": {"name": "draw_box", "arguments": "{}"}}
BAD = {
    "a web page": ((200, {"Content-Type": "text/html"}, b"<html>Welcome.</html>"), "no chat completion"),
    "no choices": ((200, {}, b'{"choices": []}'), "no chat completion"),
    "no message": ((200, {}, b'{"choices": [{"message": null}]}'), "no chat completion"),
    "no text": (completion(None), "no plain text"),
    "a call": (answer_with(content="", tool_calls=[CALL]), "without parsers of tools"),
    "a thought": (answer_with(content="", reasoning_content="Hm."), "without parsers of tools and reasoning"),
    "no room": ((400, {}, b'{"error": {"code": "context_length_exceeded", "message": "too long"}}'), "too long"),
    "no model": ((404, {}, b"{}"), "no model 'm'"),
    "full": ((429, {"Retry-After": 0.1}, b"{}"), "lower student_workers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_answer_stops_the_run_with_one_sentence(serve, records, tmp_path, kind):
    answer, words = BAD[kind]
    server = serve(lambda request, n: answer)
    said = said_by(tmp_path, lambda: rollouts(student(server, tmp_path), records))
    assert said.startswith(f"The student at {server.url} ") and words in said
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.slow
def test_a_silent_server_and_an_address_that_is_none(serve, records, tmp_path):
    server = serve(lambda request, n: time.sleep(1) or "")
    slow = student(server, tmp_path, replace(PROFILE, student_timeout=0.3))
    assert "raise student_timeout" in said_by(tmp_path, lambda: rollouts(slow, records))
    with pytest.raises(ArtefactError, match="is no address of a student"):
        student("localhost:8000", tmp_path)


@pytest.mark.slow
def test_after_a_death_in_the_middle_only_the_rest_is_asked(serve, behind, local, records, tmp_path):
    dying = serve(lambda request, n: behind(request) if n <= 7 else None)
    said = said_by(tmp_path, lambda: rollouts(student(dying, tmp_path), records))
    assert "cannot be reached: start it, or correct its address" in said
    assert len(list((tmp_path / "cache").glob("*.json"))) == 7
    alive = serve(behind)
    assert rollouts(student(alive, tmp_path), records) == rollouts(local, records)
    assert len(alive.asked) == len(records) * (PROFILE.turns + 1) - 7


# ---------------------------------------------------------------------------------------------- its run
def test_two_engines_do_not_share_a_run(tmp_path):
    one, other = (replace(PROFILE, engine=f"served: {name}") for name in ("one", "other"))
    Run(PROFILE, 0, tmp_path / "local")
    Run(one, 0, tmp_path / "served")
    for profile, folder in ((one, "local"), (PROFILE, "served"), (other, "served")):
        with pytest.raises(ArtefactError, match="another engine .* name another --run-dir") as caught:
            Run(profile, 0, tmp_path / folder)
        assert profile.engine in str(caught.value) and str(caught.value).count(". ") == 0
    Run(replace(one, student_workers=1, student_timeout=1.0), 0, tmp_path / "served")
    note = tmp_path / "local" / "run.json"
    values = json.loads(note.read_text())
    del values["values"]["engine"]  # a run that is older than the choice
    note.write_text(json.dumps(values))
    Run(PROFILE, 0, tmp_path / "local")


def test_a_served_run_takes_nothing_from_the_reference(tmp_path):
    assert Run(PROFILE, 0, tmp_path / "local").find("rollouts/sft_ivt.jsonl").exists()
    with pytest.raises(ArtefactError, match="is not in"):
        Run(replace(PROFILE, engine="served: m"), 0, tmp_path / "served").find("rollouts/sft_ivt.jsonl")


def test_the_stages_of_served_students(tiny_profile, tmp_path):
    """All that needs no logits: with adapters their loops, too, and in notebook 6 all but confidence."""
    asked, box = {}, '{"bbox_2d": [100, 100, 600, 600]}'

    def made(name):
        def answers(chats, *_):
            asked[name] = asked.get(name, 0) + len(chats)
            return [box] * len(chats)

        return pipeline.Student(None, None, tiny_profile.grid, answers)

    profile = replace(tiny_profile, engine="served: m", train=4, val=4, test=4)
    run, students = Run(profile, 0, tmp_path), {name: made(name) for name in (None, "sft", "grpo_single")}
    pipeline.evaluation(run, students)
    base = {stage for stage in run.stages() if stage.startswith("rollouts/second_")} | {
        f"rollouts/{name}" for name in ("base_ivt", "base_ivt_long", "base_ivt_bare", "train_step0")
    }
    tuned = {"rollouts/sft_ivt", "rollouts/sft_ivt_long", "rollouts/grpo_single"}
    assert set(run.stages()) == base | tuned
    assert asked["grpo_single"] == 4 and asked["sft"] == 4 * (profile.long_turns + 1)
    pipeline.mirage(run, students)
    more = {stage.split("/")[1] for stage in set(run.stages()) - base - tuned}
    assert {"sampled_sft_ivt", "sampled_sft_ivt_val", "val_sft_ivt"} < more and len(more) == 11
    assert all(name.startswith(("sampled_sft_ivt", "control_sft_ivt_", "val_")) for name in more)
    told = results_from(tmp_path, versions={}, commit=None)["methods"]["sft_ivt"]  # all but what needs logits
    assert [row["rule"] for row in told["rules"][1:3]] == ["final step", "consensus of the steps"]
    assert len(told["rules"]) == 6 and len(told["controls"]) == 8 and told["calibration"] == []
    assert len(mirage_tables(told)) == 3


def test_a_run_knows_under_which_names_its_students_were_served(tmp_path):
    run = Run(replace(PROFILE, engine="served: m"), 0, tmp_path)
    students = served.served_students(run, "http://127.0.0.1:1/v1", {None: "m", "sft": "mine"})
    assert students.keys() == {None, "sft"} and students["sft"].served.__self__.model == "mine"
    served.served_students(run, "http://127.0.0.1:1/v1", {None: "m", "grpo": "third"})  # one more is no contradiction
    served.served_students(run, "http://127.0.0.1:1/v1", {None: "m", "sft": "other"})  # nothing was answered yet
    run.rollouts("sft_ivt", lambda: [])
    with pytest.raises(ArtefactError, match="holds answers of 'other' for sft, and 'mine' is another model"):
        served.served_students(run, "http://127.0.0.1:1/v1", {None: "m", "sft": "mine"})


def test_the_profile_of_a_served_run_says_nothing_of_precision():
    profile = served.served_profile(replace(get_profile("paper"), student_workers=5), "m")
    assert (profile.engine, profile.batch_size) == ("served: m", 5)
    assert not profile.load_in_4bit and not profile.eyes_in_16bit


@pytest.mark.parametrize(
    "words, said",
    [
        (("eval", "--model", "m"), "A served student needs --base-url and --model."),
        (("eval", "--base-url", "http://127.0.0.1:1/v1"), "A served student needs --base-url and --model."),
        (("mirage", "--base-url", "http://127.0.0.1:1/v1", "--model", "m"), "Notebook 6 asks students with adapters"),
        (("eval", "--base-url", "http://127.0.0.1:1/v1", "--model", "m"), "cannot be reached"),
    ],
)
def test_the_command_ends_in_one_sentence(words, said, tmp_path, capsys):
    assert main([*words, "--profile", "smoke", "--run-dir", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_transformers_serve_dies_and_comes_back_and_the_rollouts_are_the_local_ones(tmp_path, capsys):
    def run(folder, *more):
        return main(["eval", "--profile", "smoke", "--run-dir", str(tmp_path / folder), *more])

    assert run("local") == 0
    cache = tmp_path / "served" / "served"

    def kill(process):
        while len(list(cache.glob("*.json"))) < 90 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    with transformers_serve(tmp_path / "first.log") as (process, url):
        killer = threading.Thread(target=kill, args=(process,), daemon=True)
        killer.start()
        assert run("served", "--base-url", url, "--model", MICRO) == 2
        killer.join()
    assert f"The student at {url} cannot be reached" in capsys.readouterr().err
    half = Run(replace(get_profile("smoke"), engine=f"served: {MICRO}"), 0, tmp_path / "served").stages()
    assert 0 < len(half) < 10
    with transformers_serve(tmp_path / "second.log") as (_, url):
        assert run("served", "--base-url", url, "--model", MICRO) == 0
    for path in sorted((tmp_path / "local" / "rollouts").glob("*.jsonl")):
        assert read_jsonl(tmp_path / "served" / "rollouts" / path.name) == read_jsonl(path), path.name
    assert main(["eval", "--profile", "smoke", "--run-dir", str(tmp_path / "served")]) == 2
    assert "another engine" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the page
def test_the_pages_commands_have_the_profiles_values():
    page = (PROJECT / "docs" / "researcher.md").read_text(encoding="utf-8")
    block = page.split("## A served student")[1].split("```bash\n")[1].split("```")[0].replace("\\\n", "")
    vllm, sglang = (shlex.split(line) for line in block.splitlines() if "vllm serve" in line or "launch_server" in line)
    paper = get_profile("paper")
    images = {"image": max(paper.turns, paper.long_turns) + 1}

    def after(command, flag):
        return command[command.index(flag) + 1]

    assert json.loads(after(vllm, "--limit-mm-per-prompt")) == json.loads(after(sglang, "--limit-mm-data-per-request"))
    assert json.loads(after(vllm, "--limit-mm-per-prompt")) == images
    assert json.loads(after(vllm, "--mm-processor-kwargs"))["size"]["longest_edge"] == paper.max_pixels
    assert json.loads(after(sglang, "--mm-process-config"))["image"]["max_pixels"] == paper.max_pixels
    for command in (vllm, sglang):
        assert paper.student in command and after(command, "--revision") == paper.student_revision
        assert after(command, "--max-lora-rank") == str(paper.lora_rank)
    adapters = set(re.findall(r"(\w+)=runs/paper/adapters/\1", block))
    assert adapters == {method.adapter for method in METHODS.values() if method.adapter}
