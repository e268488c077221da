"""The students in a web page: their networks say what PyTorch says, and the page does what the package does."""

import functools
import random
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import chromium

from ivt_utils import cli, protocol
from ivt_utils.boxes import iou, parse_answer, snap
from ivt_utils.course import live, live_networks
from ivt_utils.grpo import advantages, group_rewards
from ivt_utils.loop import evaluate
from ivt_utils.methods import METHODS
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.profiles import get_profile
from ivt_utils.records import load_split
from ivt_utils.runtime.files import ROOT, ArtefactError, read_json
from ivt_utils.runtime.store import find_reference
from ivt_utils.student import load_student, read_chats

EXPORT = "the extra live is not installed: .venv/bin/pip install -e '.[live]'"
PROFILE = get_profile("micro")


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
    total = sum(path.stat().st_size for path in built.iterdir()) / 1e6
    assert total <= 25 and f"The page loads about {total:.0f} MB" in (ROOT / "docs" / "live.md").read_text()


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


# ------------------------------------------------------------------------------------------------ in a browser
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><link rel="stylesheet" href="book.css"><div id="live"></div>
<script src="live_student.js" defer></script><script src="live.js" defer></script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def static_server(folder):
    """Yield the address of a plain server of a folder, with no headers of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """The folder of a site that has the page's own scripts, and nothing else of the book."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("book.css", "live.js", "live_student.js"):
        shutil.copy(ROOT / "docs" / "_static" / name, folder)
    shutil.copytree(built, folder / "live")
    (folder / "index.html").write_text(PAGE)
    return folder


@pytest.fixture(scope="module")
def browser(site):
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, site):
    """Open the page: `opened(width)`; what goes wrong in it, and what it asks of other hosts, is kept in `.wrong`."""
    with static_server(site) as address:

        def open_page(width=1440, where=f"{address}/index.html"):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.wrong = []
            page.on("console", lambda said: page.wrong.append(said.text))
            page.on("pageerror", lambda error: page.wrong.append(str(error)))
            page.on("request", lambda sent: page.wrong.append(sent.url) if not here(sent.url) else None)
            page.goto(where)
            return page

        def here(url):
            return url.startswith((address, "data:", "blob:", "file:"))

        yield open_page
    for context in browser.contexts:
        context.close()


@pytest.fixture
def page(opened):
    page = opened()
    page.wait_for_selector("#live-ask:enabled")
    yield page
    assert not page.wrong


@pytest.fixture(scope="module")
def scenes(built):
    return read_json(built / live.WORDS)["scenes"]


def test_the_page_makes_the_same_tokens_and_words(page, val):
    student, chance = student_of("sft_ivt"), random.Random(0)
    tokenizer = student.processor.tokenizer
    for record in val.select(range(20)):
        image = load_image(record["image"])
        steps = [
            {
                "text": f"It is too high: move down. {protocol.answer_text((10, 20, 300, 1000))}",
                "box": (10, 20, 300, 1000),
            },
            {"text": "I see none, 95 {", "box": None},
            {"text": "", "box": None},
        ]
        chat = protocol.transcript(image, record["expression"], steps, draw_box)[:-1]
        said = [next(p["text"] for p in m["content"] if p["type"] == "text") for m in chat if m["role"] == "user"]
        turns = [{"said": words, "text": step["text"]} for words, step in zip(said, steps, strict=True)]
        del turns[-1]["text"]
        ids = page.evaluate("turns => IVT_LIVE.encode(IVT_LIVE.chat(turns))", turns)
        assert ids == read_chats(student, [chat])["input_ids"][0].tolist()
    for _ in range(100):
        text = (
            "".join(tokenizer.convert_ids_to_tokens(chance.choices(range(len(tokenizer)), k=12))) + " x\u00e9\U0001f534"
        )
        ids = tokenizer(text)["input_ids"]
        assert page.evaluate("text => IVT_LIVE.encode(text)", text) == ids
        assert page.evaluate("ids => IVT_LIVE.decode(ids)", ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_page_finds_snaps_and_scores_the_same_boxes(page):
    chance = random.Random(0)
    whole = '{"bbox_2d": [10, 20, 300, 1000]}'
    texts = [whole, f"It fits: keep it. {whole}", whole * 2, "", "10", whole.replace("10,", "010,")]
    texts += [whole.replace("10,", "400,"), whole.replace("1000", "1001"), whole.replace("10,", " 10 ,\n")]
    texts += [whole.replace(", 1000", ""), whole.replace("]}", ", 5]}"), whole.replace("]}", "")]
    tokens = student_of("base_ivt").processor.tokenizer.convert_ids_to_tokens([*range(8, 21), *range(21, 330, 7)])
    texts += ["".join(chance.choices(tokens[:14], k=4) + [whole]) for _ in range(100)]
    for text in texts:
        box = parse_answer(text)
        assert page.evaluate("text => IVT_LIVE.parse(text)", text) == (box and list(box)), text
    boxes = [[chance.uniform(-50, 1050) for _ in range(4)] for _ in range(50)]
    snapped = [list(snap(box, PROFILE.grid)) for box in boxes]
    assert page.evaluate("boxes => boxes.map(IVT_LIVE.snap)", boxes) == snapped
    for a, b in zip(snapped, [*snapped[1:], None], strict=True):
        assert page.evaluate("([a, b]) => IVT_LIVE.iou(a, b)", [a, b]) == pytest.approx(iou(a, b))


SEE = """async ([address, box]) => {
  const image = Object.assign(new Image(), {src: address});
  await image.decode();
  const seen = await IVT_LIVE.see(IVT_LIVE.pixelsOf(image), box);
  return [[...seen.shown], [...seen.features]]; }"""


def test_the_page_shows_the_same_pixels(page, scenes, val):
    student, chance, images = student_of("base_ivt"), random.Random(1), {}
    for record in val:
        images.setdefault(record["image_id"], record["image"])
    for scene, image in zip(scenes[:8], images.values(), strict=False):
        box = some_box(chance)
        drawn = draw_box(load_image(image), box)
        shown, features = page.evaluate(SEE, [scene["image"], box])
        assert np.array_equal(np.array(shown).reshape(192, 192, 4), as_bytes(drawn))
        inputs = student.processor.image_processor(images=[drawn], return_tensors="pt")
        with torch.inference_mode():
            seen = student.model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
        assert np.abs(np.array(features) - seen.flatten().numpy()).max() < 0.05  # of about 8: weights of 16 bits


LOOP = """async ([name, scene, turns]) => {
  const image = Object.assign(new Image(), {src: scene.image});
  await image.decode();
  let steps = [];
  const seconds = [];
  for (let t = 0; t <= turns; t++) {
    const begun = performance.now();
    steps = [...steps, await IVT_LIVE.step(name, IVT_LIVE.pixelsOf(image), scene.questions[0].expression, steps)];
    seconds.push((performance.now() - begun) / 1000);
  }
  return [steps.map(({text, box}) => ({text, box})), seconds]; }"""


@pytest.mark.parametrize("name", live.STUDENTS)
def test_twenty_scenes_through_the_whole_loop_end_as_in_pytorch(page, scenes, val, name):
    records = {record["id"]: record for record in val}
    asked = scenes[:20]
    student = load_student(PROFILE, METHODS[name].adapter and find_reference(f"adapters/{METHODS[name].adapter}"))
    for weight in student.model.parameters():  # as the page has them
        if weight.numel() > live_networks.LARGE:
            weight.data = weight.data.half().float()
    wanted = evaluate(
        student, [records[scene["questions"][0]["id"]] for scene in asked], PROFILE, turns=PROFILE.long_turns
    )
    first, later, same = [], [], []
    for scene, rollout in zip(asked, wanted, strict=True):
        steps, seconds = page.evaluate(LOOP, [name, scene, PROFILE.long_turns])
        first, later = [*first, seconds[0]], [*later, *seconds[1:]]
        same += [
            ours["text"] == theirs["text"] and tuple(ours["box"] or ()) == tuple(theirs["box"] or ())
            for ours, theirs in zip(steps, rollout["steps"], strict=True)
        ]
    print(
        f"{name}: {sum(same)} of {len(same)} answers are PyTorch's; the first after {first[0]:.1f} s with the loading, "
        f"later ones after {np.median(later):.2f} s (median), {max(later):.2f} s (longest)"
    )
    assert all(same) and first[0] < 5 and np.median(later) < 1


def wait_for_steps(page, count):
    page.wait_for_function(f"document.querySelectorAll('.live-steps li').length == {count}")
    page.wait_for_selector("#live-restart:enabled")


def test_the_page_is_used_with_the_keyboard_alone(opened, scenes):
    page = opened(390)
    page.wait_for_selector("#live-ask:enabled")

    def press(name, key):
        page.locator(f"#live-{name}").focus()
        page.keyboard.press(key)

    press("scene", "ArrowDown")
    press("student", "ArrowDown")
    expression = scenes[1]["questions"][0]["expression"]
    assert expression in page.locator(".live-picture img").get_attribute("alt")
    assert page.locator("#live-own").is_hidden() and page.locator("#live-again").is_disabled()
    press("ask", "Enter")
    wait_for_steps(page, 1)
    for count in range(2, PROFILE.long_turns + 2):
        page.keyboard.press("Enter")  # the focus has gone on to the next button, and stays there
        wait_for_steps(page, count)
    assert page.locator("#live-again").is_disabled() and page.locator("#live-own").is_hidden()
    alt, told = page.locator(".live-picture img").get_attribute("alt"), page.locator("#live-status").inner_text()
    assert "step 5" in alt and "The true box" in alt and "last of 5 refinements" in told
    assert (
        page.locator(".live-steps canvas")
        .last.get_attribute("aria-label")
        .startswith("Shown at step 5: the scene with")
    )
    press("truth", "Space")
    assert "The true box" not in page.locator(".live-picture img").get_attribute("alt")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    press("restart", "Enter")
    wait_for_steps(page, 0)
    assert not page.wrong


def test_six_sampled_answers_have_the_rewards_and_advantages_of_grpo(page, scenes):
    page.locator("#live-scene").select_option("2")
    page.locator("#live-ask").click()
    wait_for_steps(page, 1)
    page.locator("#live-sample").click()
    page.wait_for_selector(".live-group tbody tr")
    rows = [row.locator("td").all_inner_texts() for row in page.locator(".live-group tbody tr").all()]
    truth = scenes[2]["questions"][0]["truth"]
    assert len(rows) == PROFILE.generations and len({text for text, *_ in rows}) > 1
    form = {"id": "a", "image_id": "a", "subset": "easy", "expression": "", "truth": truth}
    rollouts = [form | {"steps": [{"text": text, "box": parse_answer(text)}]} for text, *_ in rows]
    rewards = group_rewards(rollouts, PROFILE.format_bonus)
    shown = [[float(value) for value in values] for _, *values in rows]
    wanted = zip(
        [iou(r["steps"][0]["box"], truth) for r in rollouts], rewards, *advantages([rewards], "group"), strict=True
    )
    assert np.abs(np.array(shown) - np.array([*wanted])).max() < 0.006
    broken = [{"text": "", "box": None}, {"text": "", "box": [*snap(truth)]}]
    scored = page.evaluate("([answers, truth]) => IVT_LIVE.rewarded(answers, truth)", [broken, truth])
    rewards = group_rewards([form | {"steps": [answer]} for answer in broken], PROFILE.format_bonus)
    assert [row["reward"] for row in scored] == pytest.approx(rewards)
    assert [row["advantage"] for row in scored] == pytest.approx(advantages([rewards], "group")[0])


def test_a_box_of_the_readers_own_is_shown_by_mouse_or_by_numbers(page, scenes, val):
    record = next(record for record in val if record["id"] == scenes[0]["questions"][0]["id"])
    student = student_of("sft_grpo_ivt")
    page.locator("#live-student").select_option("sft_grpo_ivt")
    page.locator("#live-ask").click()
    wait_for_steps(page, 1)
    assert page.locator("#live-show").is_disabled()
    frame = page.locator(".live-picture").bounding_box()
    x, y, side = frame["x"], frame["y"], frame["width"]
    page.mouse.move(x + 0.8 * side, y + 0.9 * side)
    page.mouse.down()
    page.mouse.move(x + 0.4 * side, y + 0.5 * side, steps=3)
    page.mouse.up()
    drawn = [int(page.locator(f"#live-{name}").input_value()) for name in ("left", "top", "right", "bottom")]
    assert np.abs(np.array(drawn) - [400, 500, 800, 900]).max() <= 10
    for name, value in zip(("left", "top", "right", "bottom"), (100, 100, 305, 300), strict=True):
        page.locator(f"#live-{name}").fill(str(value))
    shown = (100, 100, 310, 300)  # on the student's grid
    page.locator("#live-show").click()
    wait_for_steps(page, 2)
    rollouts = evaluate(student, [record], PROFILE, turns=1, shown=[shown])
    texts = page.locator(".live-steps p:not(.live-score)").all_inner_texts()
    assert texts == [step["text"] for step in rollouts[0]["steps"]]
    assert str([*shown]).replace(" ", "") in page.locator(".live-steps canvas").last.get_attribute("aria-label")
    pixels = page.locator(".live-steps canvas").last.evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, 192, 192).data]"
    )
    assert np.array_equal(np.array(pixels).reshape(192, 192, 4), as_bytes(draw_box(load_image(record["image"]), shown)))
    page.locator("#live-left").fill("400")  # no box: its left side lies right of its right one
    assert page.locator("#live-show").is_disabled()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (live.WORDS, None, "The file live.json is missing: `ivt build live` makes it"),
        (live.WORDS, "{", "The file live.json is damaged"),
        (live.EYES, None, "The file eyes.onnx is missing"),
        ("base_ivt.onnx", "nothing", "The file base_ivt.onnx, or the runtime beside it, is damaged"),
        (live.RUNTIME_FILES[0], None, "The file ort.wasm.min.js is missing"),
    ],
)
def test_a_broken_or_missing_file_gives_a_sentence(opened, browser, name, content, said):
    def answer(route):
        route.fulfill(status=404) if content is None else route.fulfill(body=content)

    context = browser.new_context()
    context.route(f"**/{name}", answer)
    page = context.new_page()
    page.goto(opened().url)
    if name != live.WORDS:
        page.wait_for_selector("#live-ask:enabled")
        page.locator("#live-ask").click()
    page.wait_for_function("text => document.getElementById('live').innerText.includes(text)", arg=said)


def test_a_page_opened_as_a_file_says_how_to_serve_it(opened, site):
    page = opened(where=(site / "index.html").as_uri())
    page.wait_for_selector(".live-trouble")
    assert "python -m http.server" in page.locator("#live").inner_text() and not page.wrong
