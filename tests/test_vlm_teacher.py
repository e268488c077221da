"""The VLM teacher against a scripted HTTP server, and against `transformers serve` with the shipped micro student."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MICRO, completion, transformers_serve
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivt_utils import harvest, protocol
from ivt_utils.boxes import format_answer
from ivt_utils.overlay import draw_box
from ivt_utils.paper_scale import trace_check, vlm_teacher
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ArtefactError
from ivt_utils.teacher import geometric_trace

PROJECT = Path(__file__).resolve().parent.parent
PROFILE = replace(get_profile("smoke"), teacher_workers=4, teacher_timeout=20.0, teacher_tries=3, turns=2)
KEY = "sk-a-key-that-nobody-may-read"
NOTED = {f"teacher_{name}": getattr(PROFILE, f"teacher_{name}") for name in ("tokens", "tries", "temperature")}


@pytest.fixture(autouse=True)
def quickly(quick):
    """No server is asked for long."""


@pytest.fixture
def rollouts(records):
    """Six rollouts whose step 0 is far off: neither it nor the middle of the way to the truth fits."""
    return [
        {
            "id": r["id"],
            "image_id": r["image_id"],
            "subset": r["subset"],
            "expression": r["expression"],
            "truth": r["bbox"],
            "steps": [{"text": format_answer(box), "box": box}],
        }
        for r in records
        for box in [wrong_box(r["bbox"])]
    ]


def wrong_box(truth):
    """A box on the other side of the image."""
    x, y = (20 if truth[0] + truth[2] > 1000 else 700), (20 if truth[1] + truth[3] > 1000 else 700)
    return [x, y, x + 200, y + 200]


def boxes(request):
    """The two boxes that a request holds, read back from its text."""
    text = request["messages"][0]["content"][-1]["text"]
    return [tuple(map(int, found.split(", "))) for found in re.findall(r"\[(\d+, \d+, \d+, \d+)\]", text)]


def good(request, _=None):
    box, truth = boxes(request)
    return "The red box covers a wrong thing. " + geometric_trace(box, truth)


def teach(server, rollouts, records, tmp_path, profile=PROFILE):
    url = server if isinstance(server, str) else server.url
    return vlm_teacher.teach(rollouts, records, profile, base_url=url, model="m", cache=tmp_path / "cache")


def budget(rollouts, records, tmp_path, model="m"):
    """The numbers of a budget: traces, rollouts, known, fewest and most requests, tokens each, and in all."""
    line = vlm_teacher.budget(rollouts, records, PROFILE, model, tmp_path / "cache")
    form = (
        r"(\d+) traces for (\d+) rollouts, (\d+) of them in the cache: (\d+) to (\d+) requests to \S+, of about "
        r"(\d+) tokens, ([\d,]+) to ([\d,]+) in all\."
    )
    return [int(number.replace(",", "")) for number in re.fullmatch(form, line).groups()]


def files(tmp_path):
    return list((tmp_path / "cache").glob("*.json"))


@contextmanager
def one_sentence(tmp_path, *words):
    """The block ends with an ArtefactError of one sentence that holds the words and says how to go on."""
    with pytest.raises(ArtefactError) as stopped:
        yield
    said = str(stopped.value)
    assert said.endswith(f"; what is finished is kept in {tmp_path / 'cache'}, and the same command goes on.")
    assert "\n" not in said and not re.search(r"[.!?] [A-Z]", said)
    assert all(word in said for word in words), said


# ---------------------------------------------------------------------------------------------- good answers
def test_good_answers_become_the_traces(serve, rollouts, records, tmp_path):
    server = serve(good)
    taught = teach(server, rollouts, records, tmp_path)
    geometric = [harvest.trajectory(rollout, 2, PROFILE.grid) for rollout in rollouts]
    for mine, theirs, rollout in zip(taught, geometric, rollouts, strict=True):
        assert mine["id"] == rollout["id"] and mine["teacher"] == "m" and mine["stood_in"] == 0
        assert [step["box"] for step in mine["steps"]] == [step["box"] for step in theirs["steps"]]
        assert mine["steps"][0] == rollout["steps"][0]
        for own, geo in zip(mine["steps"][1:], theirs["steps"][1:], strict=True):
            assert own["text"].startswith("The red box covers a wrong thing. It is too ")
            assert own["text"].endswith(protocol.answer_text(own["box"]))
            assert geo["text"].split(": ")[0] in own["text"]
    assert len(server.asked) == len(files(tmp_path)) == 12
    teach(server, rollouts, records, tmp_path)
    assert len(server.asked) == 12  # everything came from the cache


def test_a_request_holds_both_images_and_both_boxes(serve, rollouts, records, tmp_path):
    server = serve(good)
    teach(server, rollouts[:1], records, tmp_path)
    request, rollout, record = server.asked[0], rollouts[0], records[0]
    *pictures, text = request["messages"][0]["content"]
    shown = [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1]))) for p in pictures]
    assert len(shown) == 2 and {p.size for p in shown} == {record["image"].size}
    overlay = draw_box(record["image"], rollout["steps"][0]["box"])
    for picture, meant in zip(shown, (record["image"], overlay), strict=True):
        pairs = zip(picture.convert("RGB").tobytes(), meant.tobytes(), strict=True)
        assert sum(abs(a - b) for a, b in pairs) / len(meant.tobytes()) < 4  # JPEG's loss, of 255
    assert shown[0].tobytes() != shown[1].tobytes()
    assert boxes(request) == [tuple(rollout["steps"][0]["box"]), tuple(round(v) for v in rollout["truth"])]
    assert rollout["expression"] in text["text"]
    assert all(pair in text["text"] for pair in (f"{a}: {b}" for a, b in protocol.PROBLEMS.items()))
    assert request["model"] == "m" and request["max_completion_tokens"] == PROFILE.teacher_tokens
    assert boxes(server.asked[1])[0] == harvest.straight_line(rollout["steps"][0]["box"], rollout["truth"], 2, 10)[0]


def test_requests_are_under_way_at_once_but_never_more_than_the_workers(serve, rollouts, records, tmp_path):
    def slow(request, n):
        time.sleep(0.2)
        return good(request)

    server = serve(slow)
    taught = teach(server, rollouts, records, tmp_path)
    assert 2 <= server.most <= PROFILE.teacher_workers
    assert [t["id"] for t in taught] == [r["id"] for r in rollouts]


def test_the_budget_is_what_happens(serve, rollouts, records, tmp_path):
    traces, each, known, fewest, most, tokens, low, high = budget(rollouts, records, tmp_path)
    assert (traces, each, known, fewest, most) == (12, 6, 0, 12, 36) and (low, high) == (12 * tokens, 36 * tokens)
    width, height = records[0]["image"].size
    assert tokens > 2 * width * height // 1024 + PROFILE.teacher_tokens + 100
    teach(serve(good), rollouts[:4], records, tmp_path)
    assert budget(rollouts, records, tmp_path)[:5] == [12, 6, 8, 4, 12]
    assert budget(rollouts, records, tmp_path, "another")[2] == 0
    teach(serve(good), rollouts, records, tmp_path)
    assert budget(rollouts, records, tmp_path)[2:] == [12, 0, 0, 0, 0, 0]


# ---------------------------------------------------------------------------------------------- refused answers
GARBAGE = {
    "a web page": lambda r: (200, {"Content-Type": "text/html"}, b"<html>Welcome.</html>"),
    "no JSON": lambda r: (200, {}, b"<html>"),
    "no choices": lambda r: (200, {}, b'{"choices": []}'),
    "no message": lambda r: (200, {}, b'{"choices": [{"message": null}]}'),
    "a list": lambda r: (200, {}, b"[]"),
    "no text": lambda r: completion(None),
    "a box": lambda r: '{"bbox_2d": [100, 200, 300, 400]}',
    "digits": lambda r: geometric_trace(*boxes(r)) + " By 120.",
    "the wrong way": lambda r: geometric_trace(*reversed(boxes(r))),
    "that it fits": lambda r: protocol.TRACE_FITS,
    "that it knows": lambda r: geometric_trace(*boxes(r))[:-1] + ", as the ground truth says.",
    "a filtered picture": lambda r: (400, {}, b'{"error": {"code": "content_policy_violation", "message": "no"}}'),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_refused_and_the_geometric_teacher_stands_in(serve, rollouts, records, tmp_path, kind):
    server = serve(lambda request, n: GARBAGE[kind](request))
    taught = teach(server, rollouts[:2], records, tmp_path)
    assert len(server.asked) == 2 * 2 * PROFILE.teacher_tries
    for mine, rollout in zip(taught, rollouts[:2], strict=True):
        assert mine == {**harvest.trajectory(rollout, 2, PROFILE.grid), "teacher": "m", "stood_in": 2, **NOTED}
    asked = len(server.asked)
    teach(server, rollouts[:2], records, tmp_path)
    no_completion = kind in ("a web page", "no JSON", "no choices", "no message", "a list")
    assert len(server.asked) - asked == (asked if no_completion else 0)  # an answer is kept, a broken reply is not


def test_a_refused_answer_is_asked_again_with_the_reason(serve, rollouts, records, tmp_path):
    def script(request, n):
        return good(request) if "was refused" in request["messages"][0]["content"][-1]["text"] else "It is 12 off."

    server = serve(script)
    taught = teach(server, rollouts[:1], records, tmp_path)
    assert taught[0]["stood_in"] == 0 and len(server.asked) == 4
    assert "refused, for it holds numbers" in server.asked[1]["messages"][0]["content"][-1]["text"]
    assert budget(rollouts[:1], records, tmp_path)[2:5] == [2, 0, 0]


LEFT, FAR, FIT = (100, 100, 200, 200), (500, 500, 900, 900), (100, 100, 200, 200)
TRUTH = (200, 100, 300, 200)  # LEFT has to move right


@pytest.mark.parametrize(
    "answer, box, reason",
    [
        ("The red box covers the cup. It is too far left: move right.", LEFT, ""),
        ("\n“It's too far to the left, so move it a bit to the right.” ", LEFT, ""),
        ("This is the neighbor's chair; shift the red box right so that it fits the whole chair!", LEFT, ""),
        ("The dog on the left side of the image is missed, the box should be moved right.", LEFT, ""),
        ("It is much too large and too low: make it smaller and move up.", FAR, ""),
        ("It covers half the room and is too far right and low, move it up and to the left.", FAR, ""),
        ("It fits the mug well, no need to move it.", None, ""),
        ("", LEFT, "is empty"),
        ("It is too far left: move right", LEFT, "whole sentences"),
        ("It is too far left. It is off. Move right.", LEFT, "whole sentences"),
        ("Move right by a hundred pixels.", LEFT, "numbers"),
        ("Move right. <think>", LEFT, "numbers"),
        ("Move right, towards the correct box.", LEFT, "is known"),
        ("The student's answer is too far left.", LEFT, "is known"),
        ("It is too far right: move left.", LEFT, 'says "right" of a box that is too far left'),
        ("It is too far left: move left.", LEFT, 'says "left"'),
        ("It is too far left and too high.", LEFT, 'says "high"'),
        ("It is too far left: move right and make it wider.", LEFT, 'says "wider"'),
        ("It is too small, move right.", LEFT, 'says "small"'),
        ("It is not too far left.", LEFT, "what not to do"),
        ("Don't move right.", LEFT, "what not to do"),
        ("It covers another cup.", LEFT, "does not say that the box is too far left"),
        ("It is too wide and too tall.", FAR, "does not say that the box is too far right or too low"),
        ("It fits. But move right.", LEFT, "says that the box fits"),
        ("Stretch the box, and move right.", LEFT, "edges"),
        ("Its left edge is off, move right.", LEFT, "edges"),
        ("It is too far left: move right.", None, "asks for a change"),
        ("It covers the cup.", None, "does not say that the box fits"),
        ("It is too far left and not tall enough: move right.", LEFT, "other words"),
        ("Too far left and should be higher: move right.", LEFT, "other words"),
        ("Move right, then go up.", LEFT, "other words"),
        ("Move right and extend downward.", LEFT, "other words"),
        ("Move right and reduce its height.", LEFT, "other words"),
        ("Move right and widen.", LEFT, "other words"),
        ("The box is perfect, but move right.", LEFT, "says that the box fits"),
        ("The red box does not fit the cup.", None, "does not say that the box fits"),
        ("The box must be halved. It does not fit.", None, "other words"),
        ("Move right to match the true location.", LEFT, "is known"),
        ("Move right, to where it belongs.", LEFT, "is known"),
        ("Move right by two box widths.", LEFT, "numbers"),
        ("It covers the cup beside the star, and is too far left. Move right.", LEFT, ""),
        ("The red box covers the wrong half of the cup: it is too far to the left, so move it to the right.", LEFT, ""),
    ],
)
def test_what_is_accepted_and_why_not(answer, box, reason):
    said = trace_check.objection(answer, box or FIT, (100, 100, 200, 200) if box in (None, FAR) else TRUTH)
    assert reason in said and bool(reason) == bool(said), said


@st.composite
def two_boxes(draw):
    def box():
        low = [draw(st.integers(0, 900)) for _ in range(2)]
        return (*low, *(draw(st.integers(v + 20, 1000)) for v in low))

    return box(), box()


@given(two_boxes())
def test_the_geometric_teacher_is_never_refused_and_its_opposite_always(pair):
    trace = geometric_trace(*pair)
    assert trace_check.objection(trace, *pair) == ""
    opposite = {
        "left": "right",
        "high": "low",
        "up": "down",
        "narrow": "wide",
        "narrower": "wider",
        "short": "tall",
        "shorter": "taller",
    }
    opposite |= {b: a for a, b in opposite.items()}
    turned = re.sub(r"\w+", lambda word: opposite.get(word[0], word[0]), trace)
    assert trace_check.objection(turned, *pair) or trace == protocol.TRACE_FITS


# ---------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.slow
def test_a_full_server_is_asked_again_after_the_time_it_names(serve, rollouts, records, tmp_path):
    server = serve(lambda r, n: (429, {"Retry-After": 1}, b"{}") if n == 1 else good(r))
    began = time.monotonic()
    taught = teach(server, rollouts[:1], records, tmp_path)
    assert time.monotonic() - began >= 1
    assert len(server.asked) == 3 and taught[0]["stood_in"] == 0


@pytest.mark.parametrize("first", [(500, {}, b"oops"), (503, {}, b"{}"), None])
def test_a_failure_that_passes_is_asked_again(serve, rollouts, records, tmp_path, first):
    server = serve(lambda r, n: first if n == 1 else good(r))
    assert teach(server, rollouts[:1], records, tmp_path)[0]["stood_in"] == 0
    assert len(server.asked) == 3


@pytest.mark.slow
def test_a_silent_server_ends_with_a_sentence(serve, rollouts, records, tmp_path):
    server = serve(lambda r, n: time.sleep(1) or good(r))
    with one_sentence(tmp_path, "no answer within 0.3 seconds", "teacher_timeout"):
        teach(server, rollouts, records, tmp_path, replace(PROFILE, teacher_timeout=0.3))


@pytest.mark.parametrize(
    "said, words",
    [
        (
            (401, {}, b'{"error": {"message": "Incorrect key: %s"}}' % KEY.encode()),
            ("refuses the key", "OPENAI_API_KEY"),
        ),
        ((403, {}, b"{}"), ("refuses the key",)),
        ((404, {}, b'{"error": {"message": "no such model"}}'), ("no model 'm'",)),
        ((429, {"Retry-After": 0.1}, b"{}"), ("takes no more requests",)),
        ((400, {}, b'{"error": "too long. %s"}' % KEY.encode()), ("the error 400", "too long")),
        (
            (400, {}, b"%s %s" % (b"x" * 190, KEY.encode())),
            ("the error 400", "xxx"),
        ),  # the key at the cut of a long answer
        ((500, {}, b"out of memory"), ("the error 500", "out of memory")),
        (None, ("cannot be reached",)),
    ],
)
def test_an_error_stops_the_others_with_a_sentence(serve, rollouts, records, tmp_path, monkeypatch, said, words):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server, many = serve(lambda r, n: said), rollouts * 20
    began = time.monotonic()
    with one_sentence(tmp_path, server.url, *words):
        try:
            teach(server, many, records, tmp_path)
        except ArtefactError as error:
            assert KEY not in str(error) and KEY[:6] not in str(error)
            raise
    assert time.monotonic() - began < 10
    assert len(server.asked) <= 6 * PROFILE.teacher_workers < len(many)  # the rest was never asked
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_teacher_of_whom_nothing_is_accepted_is_stopped_early(serve, rollouts, records, tmp_path):
    """Whatever the model says is refused: all tries of all traces would be paid for, for geometric traces."""
    server, many = serve(lambda r, n: completion("[1, 2, 3, 4]")), [r for r in rollouts for _ in range(10)]
    with pytest.raises(ArtefactError, match="Not one answer about the first 20 rollouts .* raise teacher_tokens"):
        teach(server, many, records, tmp_path)
    few = rollouts[:2]
    assert [t["stood_in"] for t in teach(server, few, records, tmp_path)] == [2, 2]


def test_a_request_that_has_no_room_is_refused_like_any_other(serve, rollouts, records, tmp_path):
    server = serve(lambda r, n: (400, {}, b'{"error": {"code": "context_length_exceeded", "message": "too long"}}'))
    assert teach(server, rollouts[:1], records, tmp_path)[0]["stood_in"] == 2


def test_the_teacher_sees_images_no_larger_than_the_student(serve, rollouts, records, tmp_path):
    server = serve(good)
    teach(server, rollouts[:1], records, tmp_path, replace(PROFILE, max_pixels=96 * 96))
    urls = [part["image_url"]["url"] for part in server.asked[0]["messages"][0]["content"] if "image_url" in part]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in urls]
    assert sizes == [(96, 96)] * 2 and records[0]["image"].size == (192, 192)


def test_nobody_listening_and_an_address_that_is_none(rollouts, records, tmp_path):
    with one_sentence(tmp_path, "http://127.0.0.1:1/v1", "cannot be reached"):
        teach("http://127.0.0.1:1/v1", rollouts, records, tmp_path)
    for address in ("localhost:8000", "", "http://[::1/v1"):
        with pytest.raises(ArtefactError, match="is no address of a teacher"):
            teach(address, rollouts, records, tmp_path)


def test_after_a_death_in_the_middle_only_the_rest_is_asked(serve, rollouts, records, tmp_path):
    dying = serve(lambda r, n: good(r) if n <= 5 else None)
    with one_sentence(tmp_path, "cannot be reached"):
        teach(dying, rollouts, records, tmp_path)
    assert len(files(tmp_path)) == 5
    assert budget(rollouts, records, tmp_path)[2:5] == [5, 7, 21]
    alive = serve(good)
    taught = teach(alive, rollouts, records, tmp_path)
    assert len(alive.asked) == 7 and sum(t["stood_in"] for t in taught) == 0
    files(tmp_path)[0].write_text("{")  # damaged: asked for again
    teach(alive, rollouts, records, tmp_path)
    assert len(alive.asked) == 8


def test_the_key_is_sent_and_written_nowhere(serve, rollouts, records, tmp_path, monkeypatch):
    server = serve(good)
    teach(server, rollouts[:1], records, tmp_path)
    assert set(server.keys) == {"Bearer none"}
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    taught = teach(server, rollouts, records, tmp_path)
    assert server.keys[-1] == f"Bearer {KEY}" and KEY not in json.dumps(taught)
    assert files(tmp_path) and not [p for p in tmp_path.rglob("*") if p.is_file() and KEY in p.read_text()]
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    with pytest.raises(ArtefactError, match="OPENAI_API_KEY holds a character"):
        teach(server, rollouts, records, tmp_path)


def test_the_import_is_light_and_a_missing_package_is_said(rollouts, records, tmp_path, monkeypatch):
    code = "import sys, ivt_utils.paper_scale.vlm_teacher; print([m for m in ('openai', 'torch') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT, text=True).strip() == "[]"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ArtefactError, match=r"needs openai; run: pip install -e '\.\[teacher\]'"):
        teach("http://127.0.0.1:1/v1", rollouts, records, tmp_path)


# ---------------------------------------------------------------------------------------------- transformers serve
def posts(log: Path) -> int:
    return log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')


@pytest.mark.slow
def test_a_real_server_that_dies_and_comes_back(rollouts, records, tmp_path):
    """The micro student answers with boxes: nothing for a teacher, so every trace is the geometric teacher's."""
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    profile = replace(PROFILE, teacher_workers=2)

    def run(url, model=MICRO):
        return vlm_teacher.teach(rollouts, records, profile, base_url=url, model=model, cache=tmp_path / "cache")

    assert budget(rollouts, records, tmp_path, MICRO)[:5] == [12, 6, 0, 12, 36]
    with transformers_serve(first) as (process, url):
        with one_sentence(tmp_path, "the error 400"):  # this server is held to one model
            run(url, "another/model")

        def kill():
            while len(files(tmp_path)) < 5 and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with one_sentence(tmp_path, url, "cannot be reached"):
            run(url)
        killer.join()
    finished = len(files(tmp_path))
    assert 5 <= finished < 36
    left = budget(rollouts, records, tmp_path, MICRO)[4]
    assert left == 36 - finished
    with transformers_serve(second) as (_, url):
        taught = run(url)
        assert posts(second) == left, second.read_text()
    for mine, rollout in zip(taught, rollouts, strict=True):
        assert mine == {**harvest.trajectory(rollout, 2, PROFILE.grid), "teacher": MICRO, "stood_in": 2, **NOTED}
    assert len(files(tmp_path)) == 36 and budget(rollouts, records, tmp_path, MICRO)[2:5] == [12, 0, 0]
