"""What the tests share: a student with random weights, a few records, and a model that writes a given script."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hypothesis import settings

PROJECT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")
settings.register_profile("course", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("course")


class ScriptedModel:
    """A stand-in for a model: at its t-th call it writes `script(t, i)` for chat i; `shown` keeps what it was given."""

    device = "cpu"

    def __init__(self, processor, script):
        self.tokenizer, self.script, self.shown = processor.tokenizer, script, []

    def generate(self, **inputs):
        import torch

        ids, turn = inputs["input_ids"], len(self.shown)
        self.shown.append(inputs)
        answers = [self.tokenizer(self.script(turn, i) + "<|im_end|>")["input_ids"] for i in range(len(ids))]
        longest = max(len(answer) for answer in answers)
        pad = self.tokenizer.pad_token_id
        written = torch.cat([ids, torch.tensor([a + [pad] * (longest - len(a)) for a in answers])], 1)
        return SimpleNamespace(sequences=written, past_key_values=None)

    def prompt_ids(self, turn: int, i: int) -> list[int]:
        """The ids of chat i at a call, without the padding on the left."""
        shown = self.shown[turn]
        return shown["input_ids"][i][shown["attention_mask"][i].bool()].tolist()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of slow fixtures; files with slow tests come first, so that fast ones fill the gaps at the end."""
    for item in items:
        if "slow" in item.fixturenames:
            item.add_marker("slow")
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def slow():
    """Nothing: a fixture that asks for this one takes long, so every test that uses it is marked `slow`."""


@pytest.fixture(scope="session")
def smoke_run(slow, tmp_path_factory):
    """The six notebooks at smoke size, run once through the users' command: (folder of the run, seconds it took).

    All processes of pytest-xdist share the one run: the first one to ask makes it, and the others wait for it.
    """
    from ivt_utils import cli

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root, took = shared / "course" / "smoke", shared / "course_seconds"
    with FileLock(shared / "course.lock"):
        if not took.exists():
            started = time.time()
            assert cli.main(["run", "--profile", "smoke", "--run-dir", str(root)]) == 0
            took.write_text(str(time.time() - started))
    return root, float(took.read_text())


@pytest.fixture(scope="session")
def processor():
    from ivt_utils.micro.model import micro_processor

    return micro_processor()


@pytest.fixture(scope="session")
def tiny_student(processor):
    """The micro student with random weights, so that no test rests on the shipped ones; nobody may train it."""
    import torch

    from ivt_utils.micro.model import GRID, build_micro
    from ivt_utils.student import Student

    torch.set_num_threads(1)
    return Student(build_micro(processor, seed=0).eval(), processor, GRID)


@pytest.fixture
def fresh_student(processor):
    """A student of the test's own, to be trained or changed."""
    import torch

    from ivt_utils.micro.model import GRID, build_micro
    from ivt_utils.student import Student

    torch.set_num_threads(1)
    return Student(build_micro(processor, seed=0).eval(), processor, GRID)


@pytest.fixture
def scripted(processor):
    """Make a student that answers from a script: `scripted(lambda turn, i: ...)`."""
    from ivt_utils.micro.model import GRID
    from ivt_utils.student import Student

    return lambda script: Student(ScriptedModel(processor, script), processor, GRID)


@pytest.fixture(scope="session")
def records():
    return sample_records(6, "tests")


def sample_records(count: int, name: str) -> list[dict]:
    """Records with different images, made as the benchmark's are, but for no split of it."""
    from ivt_utils.micro import scenes

    rows = []
    for i in range(count):
        subset = scenes.SUBSETS[i % 3]
        scene, [(expression, target), *_] = scenes.sample_questions(random.Random(f"{name} {i}"), subset, 5, 1)
        rows.append(
            {
                "id": f"{name[0]}{i}-0",
                "image_id": f"{name[0]}{i}",
                "image": scenes.draw_scene(scene),
                "expression": expression,
                "bbox": [round(v, 2) for v in scene.things[target].box],
                "subset": subset,
            }
        )
    return rows


def numbers(value) -> set:
    """Every number in a value of dictionaries and lists; True and False are none."""
    if isinstance(value, dict | list):
        return {n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)}
    return {value} if isinstance(value, int | float) and not isinstance(value, bool) else set()


@pytest.fixture(scope="session")
def tiny_profile():
    """The profile `smoke`, cut down to a training of seconds."""
    from ivt_utils.profiles import get_profile

    return replace(
        get_profile("smoke"),
        lora_rank=4,
        lora_alpha=8,
        sft_batch=2,
        grpo_prompts=2,
        generations=2,
        grpo_steps=2,
        grpo_lr=1e-2,
        save_every=1,
        long_turns=3,
        grpo_turns=2,
        grpo_probe=3,
        probe_every=1,
    )


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers from `script(request, n)`: a text, or (status, headers, bytes).

    `asked` keeps the requests, `most` how many were under way at once; None as an answer closes the connection.
    """

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.keys, self.now, self.most, self.lock = script, [], [], 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.keys.append(self.headers["Authorization"])
            server.now += 1
            server.most, n = max(server.most, server.now), len(server.asked)
        try:
            said = server.script(body, n) if self.path == "/v1/chat/completions" else (404, {}, b"{}")
        finally:
            with server.lock:
                server.now -= 1
        if said is None:
            self.close_connection = True
            return
        status, headers, data = completion(said) if isinstance(said, str) else said
        try:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": len(data)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has given up

    def log_message(self, *_):
        pass


def completion(text):
    message = {"role": "assistant", "content": text}
    answer = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    }
    return 200, {}, json.dumps(answer).encode()


@pytest.fixture
def serve():
    """Start a scripted server: `serve(lambda request, n: ...)`."""
    servers = []

    def start(script):
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """A failing server is asked twice, and no key lies in the environment."""
    from ivt_utils.paper_scale import served

    monkeypatch.setattr(served, "RETRIES", 1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


MICRO = "student"


@contextmanager
def transformers_serve(log: Path):
    """Yield (process, url) of `transformers serve` with the micro student, when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        MICRO,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=PROJECT / "data", env=offline, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


CHROMIUM_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium():
    """Yield a Playwright browser: this machine's Chromium; without one the test is skipped and says why.

    Nothing that runs an event loop of its own (papermill, asyncio.run) may be called while it is open.
    """
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: install the package chromium to test in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_OPTIONS))
        yield browser
        browser.close()
