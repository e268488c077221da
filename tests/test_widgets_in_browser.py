"""The widgets in JupyterLab, in a real browser: by mouse, by keyboard, and on a screen as narrow as a phone's.

The pictures of `build/screenshots/` are what a reader sees.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
from conftest import chromium
from nbformat.v4 import new_code_cell, new_notebook

from ivt_utils.metrics import iou_matrix
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ROOT
from ivt_utils.show.widgets import WIDGET

SHOTS = ROOT / "build" / "screenshots"
CELLS = (
    """
from pathlib import Path
from ivt_utils.show import widgets
from ivt_utils.metrics import Resampling
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.runtime.files import read_jsonl
from ivt_utils.records import load_split
from ivt_utils.loop import evaluate
from ivt_utils.profiles import get_profile
from ivt_utils.student import load_student
profile = get_profile("smoke")
test = load_split(profile, "test")
student = load_student(profile, REFERENCE / "adapters" / "sft")
names = {"SFT + IVT": "sft_ivt", "SFT + GRPO + IVT": "sft_grpo_ivt"}
methods = {k: read_jsonl(REFERENCE / "rollouts" / f"{v}.jsonl")[: len(test)] for k, v in names.items()}
print("ready")""",
    'widgets.be_the_model(student, test, profile, path=Path("model.png"))',
    'widgets.trajectory_explorer(test, methods, path=Path("trajectories.png"))',
    """
groups = [evaluate(student, [record] * 6, profile, seed, temperature=profile.temperature)
          for seed, record in enumerate([test[0], test[4]])]
widgets.group_viewer(test, groups, profile.format_bonus, path=Path("group.png"))""",
    """
val = read_jsonl(REFERENCE / "rollouts" / "confidence_sft_ivt_val.jsonl")
widgets.stop_rule_slider(val, profile.thresholds, Resampling(0, 500), path=Path("rule.png"))""",
)
MODEL, TRAJECTORIES, GROUP, RULE = range(1, 5)
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is on the page
}


@contextmanager
def jupyter_lab(folder):
    """Yield the address of a JupyterLab that keeps to `folder` and asks nothing of the network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = (
        {k: v for k, v in os.environ.items() if k != "IVT_STATIC"}
        | own
        | {
            "HOME": str(folder),
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
        }
    )
    for name, value in SETTINGS.items():
        path = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port_retries=0",
        "--ServerApp.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
        "--ServerApp.disable_check_xsrf=True",
    ]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command.append("--ServerApp.allow_root=True")
    address, log = f"http://127.0.0.1:{port}", folder / "lab.log"
    with open(log, "w") as written:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=written, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def page(slow, tmp_path_factory):
    """The notebook with all widgets, run, in a window of 1100 x 1250 pixels; the console is watched throughout."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [new_code_cell(source.strip()) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "widgets.ipynb")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, jupyter_lab(folder) as address:
        page = browser.new_context(viewport={"width": 1100, "height": 1250}).new_page()
        page.set_default_timeout(60_000)
        page.said = []
        page.on("console", lambda message: message.type == "error" and page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(f"page error: {error}"))
        page.outside = []
        page.on(
            "request",
            lambda asked: (
                page.outside.append(asked.url)
                if asked.url.startswith("http") and not asked.url.startswith(address)
                else None
            ),
        )
        page.folder = folder
        page.goto(f"{address}/doc/tree/widgets.ipynb")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before it, JupyterLab would ask for a kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            cell(page, RULE).locator("figure img").wait_for()
        finally:
            page.screenshot(path=SHOTS / "notebook.png")
        yield page


def cell(page, number):
    """Return a cell of the notebook, counted from 0."""
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number)


def alt(page, number) -> str:
    return cell(page, number).locator("figure img").first.get_attribute("alt")


def until(page, condition, what: str, seconds: float = 20):
    """Return the first true value of `condition()`, else fail and say what was waited for."""
    ends = time.time() + seconds
    while not (value := condition()):
        assert time.time() < ends, f"waited in vain: {what}"
        page.wait_for_timeout(50)
    return value


def status(page) -> str:
    return cell(page, MODEL).get_by_role("status").inner_text()


def box_in(text: str) -> list[int]:
    return [int(v) for v in re.search(r"Your box: (\d+), (\d+), (\d+), (\d+)", text).groups()]


def answered(page, truth) -> list[int]:
    """Return the submitted box, after checking its IoU and the strip of the student's answers."""
    told = until(page, lambda: status(page) if "IoU" in status(page) else "", "the IoU of the submitted box")
    box = box_in(told)
    rollout = {"id": "a", "image_id": "a", "subset": "s", "truth": truth, "steps": [{"box": box}]}
    value = iou_matrix([rollout])[0, 0]
    assert f"IoU {value:.2f} with the truth" in told
    strip = cell(page, MODEL).locator(".ivt-strip")
    assert strip.locator("img").count() == 3
    assert f"step 0 (your box), IoU {value:.2f}" in strip.inner_text()
    texts = strip.locator("> div").all_inner_texts()
    assert all(re.search(r"step \d, (IoU \d\.\d\d|no box in the answer)", text) for text in texts[1:])
    assert all("bbox_2d" in text for text in texts[1:])
    alts = [image.get_attribute("alt") for image in strip.locator("img").all()]
    assert all(text.startswith("The picture with the box of step") for text in alts)
    return box


def shoot(page, number: int, name: str) -> None:
    cell(page, number).scroll_into_view_if_needed()
    page.wait_for_timeout(150)
    cell(page, number).locator(".jp-Cell-outputWrapper").screenshot(path=SHOTS / f"{name}.png")


def drag(page, start, end) -> None:
    """Drag on the canvas between two places, 0..1000."""
    canvas = cell(page, MODEL).locator("canvas")
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    (x1, y1), (x2, y2) = (
        (area["x"] + area["width"] * x / 1000, area["y"] + area["height"] * y / 1000) for x, y in (start, end)
    )
    page.mouse.move(x1, y1)
    page.mouse.down()
    page.mouse.move((x1 + x2) / 2, (y1 + y2) / 2, steps=3)
    page.mouse.move(x2, y2, steps=3)
    page.mouse.up()


def focused(page, script: str):
    return page.evaluate(f"(() => {{ const it = document.activeElement; return {script}; }})()")


@pytest.fixture(scope="module")
def truths():
    from ivt_utils.records import load_split

    return load_split(get_profile("smoke"), "test")["bbox"]


def test_a_box_dragged_with_the_mouse_is_scored_and_answered(page, truths):
    shoot(page, MODEL, "be_the_model_before")
    submit = cell(page, MODEL).get_by_role("button", name="Submit box")
    assert submit.is_disabled() and "No box yet" in status(page)
    drag(page, (900, 900), (600, 620))  # backwards, to be put in order
    drawn = box_in(status(page))
    assert all(abs(a - b) <= 10 for a, b in zip(drawn, (600, 620, 900, 900), strict=True))
    assert "600" in cell(page, MODEL).locator("canvas").get_attribute("aria-label")
    drag(page, (100, 100), (101, 101))  # a click leaves the box
    assert box_in(status(page)) == drawn
    submit.click()
    assert answered(page, truths[0]) == drawn
    shoot(page, MODEL, "be_the_model_mouse")


def test_a_box_is_drawn_and_submitted_by_keyboard_alone(page, truths):
    following = cell(page, MODEL).get_by_role("button", name="Next picture")
    following.focus()
    page.keyboard.press("Enter")
    until(page, lambda: "No box yet" in status(page), "the next picture")
    assert cell(page, MODEL).locator(".ivt-strip").count() == 0  # the answers were about the last picture
    page.keyboard.press("Tab")
    assert focused(page, "it.tagName") == "CANVAS"
    assert focused(page, "getComputedStyle(it).outlineStyle") == "solid"
    for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown", "Shift+ArrowDown"):
        page.keyboard.press(key)  # the first one makes a box
    assert box_in(status(page)) == [340, 340, 650, 660]
    for _ in range(50):
        page.keyboard.press("ArrowUp")
    assert box_in(status(page)) == [340, 0, 650, 320]  # it stays in the picture
    assert focused(page, "it.tagName") == "CANVAS"  # the notebook took no key
    shoot(page, MODEL, "be_the_model_focus")
    page.keyboard.press("Enter")
    assert answered(page, truths[1]) == [340, 0, 650, 320]
    shoot(page, MODEL, "be_the_model_keyboard")


def change(page, number: int, control, key: str) -> tuple[str, str]:
    """Press a key on a control, and return the alt text before and after, which must differ."""
    before = alt(page, number)
    control.focus()
    page.keyboard.press(key)
    until(page, lambda: alt(page, number) != before, f"another picture in cell {number} after {key}")
    return before, alt(page, number)


def test_the_trajectory_explorer_follows_each_of_its_controls(page):
    method, kind = cell(page, TRAJECTORIES).locator("select").all()
    sample, step = cell(page, TRAJECTORIES).get_by_role("slider").all()
    shoot(page, TRAJECTORIES, "trajectory_explorer")
    assert "At step 2" in alt(page, TRAJECTORIES) and "chosen with the ground truth" in alt(page, TRAJECTORIES)
    assert "At step 1" in change(page, TRAJECTORIES, step, "ArrowLeft")[1]
    assert "sample 2 of" in change(page, TRAJECTORIES, sample, "ArrowRight")[1]
    assert "most degraded" in change(page, TRAJECTORIES, kind, "ArrowDown")[1]
    assert alt(page, TRAJECTORIES).startswith("SFT + IVT, most degraded (chosen with the ground truth), sample 1 of")
    until(page, lambda: change(page, TRAJECTORIES, method, "ArrowDown")[1].startswith("SFT + GRPO"), "the other method")
    shoot(page, TRAJECTORIES, "trajectory_explorer_changed")


def test_the_group_viewer_follows_each_of_its_controls(page):
    shoot(page, GROUP, "group_viewer")
    before, after = change(page, GROUP, cell(page, GROUP).get_by_role("slider").first, "ArrowRight")
    assert before.startswith("Group 1 of 2") and after.startswith("Group 2 of 2")
    after = change(page, GROUP, cell(page, GROUP).locator("select"), "ArrowDown")[1]
    assert "divided by the spread of the group" in after and after.count("advantage ") == 6
    shoot(page, GROUP, "group_viewer_changed")


def test_the_stop_rule_follows_each_of_its_controls(page):
    shoot(page, RULE, "stop_rule")
    assert "chosen with the ground truth" in alt(page, RULE)
    slider = cell(page, RULE).get_by_role("slider").first
    step = 1 if slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemin") else -1
    pair = change(page, RULE, slider, "ArrowRight" if step == 1 else "ArrowLeft")
    before, after = (re.search(r"agree” at (\d\.\d\d)", text)[1] for text in pair)
    thresholds = [f"{value:.2f}" for value in get_profile("smoke").thresholds]
    assert thresholds.index(after) == thresholds.index(before) + step
    assert f"first enough” at {after}" in change(page, RULE, cell(page, RULE).locator("select"), "ArrowDown")[1]
    shoot(page, RULE, "stop_rule_changed")


@pytest.mark.parametrize("width", [1100, 900])
def test_nothing_has_to_be_scrolled_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(300)
    for number in range(1, 5):
        for area in cell(page, number).locator(".jp-OutputArea-output").all():
            wide, seen = area.evaluate("it => [it.scrollWidth, it.clientWidth]")
            assert wide <= seen, f"cell {number} at {width} pixels"


def test_a_finger_draws_on_a_screen_of_390_pixels(page, truths):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    canvas = cell(page, MODEL).locator("canvas")
    canvas.scroll_into_view_if_needed()
    area = canvas.bounding_box()
    assert area["x"] >= 0 and 200 <= area["width"] and area["x"] + area["width"] <= 390
    assert abs(area["width"] - area["height"]) <= 2
    touch = page.context.new_cdp_session(page)

    def finger(kind, *place):
        points = [{"x": area["x"] + area["width"] * x, "y": area["y"] + area["height"] * y} for x, y in place]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    finger("touchStart", (0.2, 0.3))
    finger("touchMove", (0.4, 0.4))
    finger("touchMove", (0.6, 0.7))
    finger("touchEnd")
    drawn = box_in(status(page))
    assert all(abs(a - b) <= 10 for a, b in zip(drawn, (200, 300, 600, 700), strict=True))
    cell(page, MODEL).get_by_role("button", name="Submit box").click()
    until(page, lambda: "IoU" in status(page), "the IoU of the finger's box")
    assert answered(page, truths[1]) == drawn
    page.screenshot(path=SHOTS / "be_the_model_390.png")
    page.set_viewport_size({"width": 390, "height": 1900})
    shoot(page, MODEL, "be_the_model_390_strip")
    page.set_viewport_size({"width": 1100, "height": 1250})


def test_the_saved_notebook_holds_a_picture_for_readers_without_widgets(page):
    page.keyboard.press("Control+s")
    path = page.folder / "widgets.ipynb"

    saved = []

    def whole() -> bool:
        try:
            saved[:] = [json.loads(path.read_text())["cells"][number]["outputs"] for number in range(1, 5)]
        except ValueError:  # it is being written
            return False
        return all(saved)

    until(page, whole, "the saved notebook")
    for (output,) in saved:
        assert {WIDGET, "image/png", "text/plain"} <= set(output["data"])
        assert output["metadata"]["image/png"]["alt"] == "".join(output["data"]["text/plain"])


def test_the_console_is_silent_and_nothing_is_asked_of_the_network(page):
    assert page.said == []
    assert page.outside == []
