"""The micro student's training: batches from a seed, the loss on the answers, and a stop that changes nothing."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ivt_utils import pretrain, protocol, scenes, student
from ivt_utils.artefacts import DATA
from ivt_utils.boxes import iou, parse_answer, valid
from ivt_utils.profiles import STUDENT_RECIPE, get_profile

SMALL = replace(
    STUDENT_RECIPE, batch_size=2, text_layers=1, vision_layers=2, words_after=1, points_in=0, window=2, vision_steps=2
)


# --- chats


def turns_of(chat):
    return [(m["role"], [part["type"] for part in m["content"]]) for m in chat]


@pytest.mark.parametrize("images, questions", STUDENT_RECIPE.chats)
def test_a_chat_has_its_images_and_questions_and_grid_boxes(images, questions):
    for seed in range(8):
        chat, shown, asked = pretrain.sample_chat(random.Random(seed), 6, images, questions)
        roles = [message["role"] for message in chat]
        assert roles == ["user", "assistant"] * (len(chat) // 2) and len(chat) <= 2 * images * questions
        kinds = [kind for role, kind in turns_of(chat) if role == "user"]
        assert kinds[0] == ["image", "text"] and sum("image" in kind for kind in kinds) == images == len(shown)
        pictures = [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]
        assert [picture.tobytes() for picture in pictures] == [scenes.draw_scene(s).tobytes() for s in shown]
        for message, (image, _, target) in zip(chat[1::2], asked, strict=True):
            box = parse_answer(message["content"][0]["text"])
            assert valid(box) and all(v % student.GRID == 0 for v in box)
            assert iou(box, shown[image].things[target].box) > 0.8
        questions_asked = [m["content"][-1]["text"] for m in chat[::2]]
        assert questions_asked == [protocol.question(None, words)["content"][0]["text"] for _, words, _ in asked]


def test_no_chat_holds_an_overlay_or_a_feedback_prompt():
    """They are what the course teaches; the student must not know them beforehand."""
    rng, opening = random.Random(0), protocol.PROMPT[0]
    for _ in range(40):
        chat, _, _ = pretrain.sample_chat(rng, 8, *rng.choice(STUDENT_RECIPE.chats))
        for message in chat:
            text = message["content"][-1]["text"]
            assert text.startswith(opening if message["role"] == "user" else '{"bbox_2d": [')
            for part in message["content"]:
                if part["type"] == "image":
                    assert (255, 0, 0) not in {color for _, color in part["image"].getcolors(192 * 192)}


def test_a_second_image_may_be_the_same_one_with_new_questions():
    rng, same = random.Random(1), []
    for _ in range(30):
        chat, _, _ = pretrain.sample_chat(rng, 6, 2, 1)
        first, second = (m["content"][0]["image"].tobytes() for m in chat[::2])
        same.append(first == second)
    assert 0.2 < sum(same) / len(same) < 0.8


BEGIN = STUDENT_RECIPE.vision_steps  # the first step of the text model


@pytest.mark.parametrize("step, level", [(0, 8), (BEGIN, 3), (BEGIN + 4, 8)])
def test_a_batch_depends_on_seed_step_and_level_alone(step, level):
    (one, labels), (two, again) = pretrain.make_batch(3, step, level), pretrain.make_batch(3, step, level)
    assert set(one) == {"input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(labels[key], again[key]) for key in ("cells", "said", "shown"))
    assert len(one["input_ids"]) == pretrain.STUDENT_RECIPE.batch_size
    for other, _ in (pretrain.make_batch(4, step, level), pretrain.make_batch(3, step + 1, level)):
        assert not torch.equal(one["pixel_values"][:144], other["pixel_values"][:144])
        assert not torch.equal(one["input_ids"][:, :90], other["input_ids"][:, :90])
    images = (one["input_ids"] == pretrain._processor.image_token_id).sum()
    assert images == len(one["pixel_values"]) // 4 == (one["mm_token_type_ids"] == 1).sum() == len(labels["cells"])


@pytest.mark.parametrize("step", [BEGIN, BEGIN + 1, BEGIN + 7])
def test_the_labels_of_an_answer_are_its_words_and_its_referent_s_image_tokens(step):
    """Read back from the batch: the words out of the ids, the referent's place out of the answer's numbers."""
    batch, labels = pretrain.make_batch(0, step, 8)
    tokenizer, side = pretrain._processor.tokenizer, 6
    row, at = pretrain.answer_mask(batch["input_ids"], tokenizer).nonzero().view(-1, 7, 2).unbind(-1)
    assert len(row) == len(labels["said"]) == len(labels["shown"])
    for answer, (chat, first) in enumerate(zip(row[:, 0].tolist(), at[:, 0].tolist(), strict=True)):
        ids = batch["input_ids"][chat]
        asked = tokenizer.decode(ids[:first]).split(protocol.PROMPT[0])[-1].split(protocol.PROMPT[1])[0]
        share = dict(zip(student.expression_words(), labels["said"][answer].tolist(), strict=True))
        said = {word.strip() for word, value in share.items() if value}
        assert said == set(asked.split()) and sum(share.values()) == pytest.approx(1)
        box = parse_answer(tokenizer.decode(ids[at[answer]], skip_special_tokens=True))
        shown = labels["shown"][answer].nonzero()[:, 0]
        images = (ids == pretrain._processor.image_token_id).nonzero()[:, 0]
        images = images[images < first][-side * side :]  # of the latest image
        for cell in (images == shown[:, None]).nonzero()[:, 1].tolist():
            x, y = (cell % side + 0.5) * 1000 / side, (cell // side + 0.5) * 1000 / side
            margin = 10 if len(shown) > 1 else 90  # a thing under no centre has the nearest token
            assert box[0] - margin <= x <= box[2] + margin and box[1] - margin <= y <= box[3] + margin
        assert len(shown) == (images == shown[:, None]).sum() >= 1


def test_the_referent_has_the_tokens_where_it_lies_on_top_or_else_the_one_at_its_centre():
    below = scenes.Thing("star", "red", "large", (0, 0, 400, 400), scenes.COLORS["red"])
    above = scenes.Thing("cross", "blue", "small", (300, 300, 500, 500), scenes.COLORS["blue"])
    tiny = scenes.Thing("cross", "red", "small", (610, 610, 680, 680), scenes.COLORS["red"])  # between four centres
    cells = pretrain.label_cells(scenes.Scene((below, above, tiny), ("plain", (240,) * 3, (230,) * 3)), 6)
    assert pretrain.referent_cells(above, cells) == [14]
    assert pretrain.referent_cells(below, cells) == [0, 1, 6, 7]
    assert pretrain.referent_cells(tiny, cells) == [3 * 6 + 3]


def test_the_label_of_an_image_token_is_the_thing_on_top_at_its_centre():
    below = scenes.Thing("star", "red", "large", (0, 0, 400, 400), scenes.COLORS["red"])
    above = scenes.Thing("cross", "blue", "small", (300, 300, 500, 500), scenes.COLORS["blue"])
    cells = pretrain.label_cells(scenes.Scene((below, above), ("plain", (240,) * 3, (230,) * 3)), 6)
    star, cross = [1, 4, 0, 0, 0.4, 0.4], [5, 5, 0.3, 0.3, 0.5, 0.5]  # indices from 1 in COLORS and SHAPES
    nothing = [0] * 6
    assert cells[0] == cells[7] == star and cells[6 * 2 + 2] == cross and cells[6] == star
    assert cells[3] == cells[35] == cells[6 * 2 + 3] == nothing and len(cells) == 36
    assert cells[1 * 6 + 2] == nothing  # x 417, y 250: right of the star, above the cross


def test_the_loss_of_the_image_tokens_is_zero_for_a_perfect_guess_and_not_otherwise():
    """Tokens that are the words' own embeddings, here unit vectors: six colours, then five shapes."""
    colors, shapes = len(scenes.COLORS), len(scenes.SHAPES)
    cells = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 4, 0.1, 0.2, 0.3, 0.4], [6, 5, 0.5, 0.5, 0.9, 0.9]])
    tokens, guesses = torch.zeros(3, colors + shapes), torch.zeros(3, 5)
    for token, guess, cell in zip(tokens, guesses, cells, strict=True):
        guess[0] = 50.0 if cell[0] else -50.0  # whether there is a thing
        if cell[0]:
            token[int(cell[0]) - 1] = token[colors + int(cell[1]) - 1] = 50.0
        guess[1:] = cell[2:]
    model = SimpleNamespace(
        cells=lambda _: guesses, get_input_embeddings=lambda: torch.eye(colors + shapes).__getitem__
    )
    names = torch.arange(colors + shapes)
    naming, framing = pretrain._cell_loss(model, tokens, cells, names)
    assert float(naming) == pytest.approx(0, abs=1e-6) and float(framing) == 0
    guesses[0, 1:] = 9  # neither a box nor a name counts where there is nothing
    tokens[0] = 7
    guesses[1, -1] += 0.8
    naming, framing = pretrain._cell_loss(model, tokens, cells, names)
    assert float(naming) == pytest.approx(0, abs=1e-6) and float(framing) == pytest.approx(0.1)
    assert float(pretrain._cell_loss(model, tokens.roll(1, 0), cells, names)[0]) > 10
    guesses[0, 0] = 50.0  # something where there is nothing
    assert float(pretrain._cell_loss(model, tokens, cells, names)[0]) > 10


# --- the loss


def test_the_mask_covers_the_answer_and_its_end(processor):
    chat = []
    for expression, box in (("the star", (10, 20, 30, 1000)), ("the red cross", (0, 0, 500, 990))):
        chat += [protocol.question(None, expression), protocol.answer(protocol.answer_text(box))]
    ids = torch.tensor([processor.tokenizer.apply_chat_template(chat, return_dict=False)])
    mask = pretrain.answer_mask(ids, processor.tokenizer)
    assert processor.tokenizer.decode(ids[mask]) == "".join(m["content"][0]["text"] + "<|im_end|>" for m in chat[1::2])
    assert mask.sum() == 14


@pytest.fixture(scope="module")
def guided(processor):
    """A fresh student as the training holds it, a batch of its chats, and the words."""
    model = student.build_micro(processor, 0).eval()
    model.set_attn_implementation({"text_config": "eager"})
    words = torch.tensor(processor.tokenizer.convert_tokens_to_ids(student.expression_words()))
    return model, *pretrain.make_batch(0, BEGIN + 5, 8), words


def test_the_loss_is_that_of_the_whole_model_on_the_answers_and_the_two_guides(guided, processor):
    model, batch, labels, words = guided
    tokenizer = processor.tokenizer
    with torch.no_grad():
        loss, (coordinate, binding, said, shown) = pretrain._loss(model, batch, labels, tokenizer, words)
        mask = pretrain.answer_mask(batch["input_ids"], tokenizer)
        attention = batch["input_ids"] != tokenizer.pad_token_id
        logits = model(**batch, attention_mask=attention, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:]], batch["input_ids"][mask], reduction="none")
    guides = STUDENT_RECIPE.word_weight * said + STUDENT_RECIPE.point_weight * shown
    assert float(loss) == pytest.approx(float(wanted.mean()) + guides, rel=1e-4) and said > 0 and shown > 0
    numbers = wanted.view(-1, 7)[:, 1:5].mean(0)  # opening, four numbers, closing, end of the turn
    assert coordinate == pytest.approx(float(numbers.mean()), rel=1e-4)
    assert binding == pytest.approx(float(numbers[0] - numbers[1]), rel=1e-3)


def test_the_guides_are_zero_for_a_student_that_says_the_words_and_looks_at_the_referent(guided, processor):
    """The model's outputs are replaced by perfect ones; then one answer alone looks elsewhere."""
    model, batch, labels, words = guided
    tokenizer, recipe = processor.tokenizer, STUDENT_RECIPE
    row, at = pretrain.answer_mask(batch["input_ids"], tokenizer)[:, 1:].nonzero().view(-1, 7, 2).unbind(-1)
    size = tuple(batch["input_ids"].shape)
    states = torch.zeros(*size, len(words))
    states[row[:, 1], at[:, 1]] = labels["said"].clamp(min=1e-30).log()  # its softmax is the share of each word
    looks = torch.zeros(size[0], 4, size[1], size[1])
    share = labels["shown"] / labels["shown"].sum(1, keepdim=True)
    looks[row[:, 1:5], 0, at[:, 1:5]] = share[:, None].expand(-1, 4, -1)

    def guides():
        output = SimpleNamespace(
            last_hidden_state=torch.zeros(*size, 1),
            hidden_states=[None] * recipe.words_after + [states], attentions=[None] * recipe.points_in + [looks],
        )  # fmt: skip
        stand_in = SimpleNamespace(
            model=lambda **_: output, lm_head=lambda h: h.expand(*h.shape[:-1], len(tokenizer)),
            get_input_embeddings=lambda: lambda _: torch.eye(len(words)),
        )  # fmt: skip
        return pretrain._loss(stand_in, batch, labels, tokenizer, words)[1][2:]

    assert guides() == pytest.approx([0, 0], abs=1e-4)
    looks[row[0, 1], 0, at[0, 1]] = 0.0  # x1 of the first answer looks at nothing
    states[row[1, 1], at[1, 1]] = 0.0  # the second answer says every word alike
    said, shown = guides()
    assert shown == pytest.approx(13.8155 / (4 * len(row)), rel=1e-3) and said > 0.01


def test_the_learning_rate_is_constant_and_then_falls_to_the_floor():
    recipe = replace(STUDENT_RECIPE, decay_from=100, decay_steps=200, floor=0.03)
    assert [pretrain._schedule(step, recipe) for step in (0, 50, 100)] == [1.0] * 3
    assert pretrain._schedule(200, recipe) == pytest.approx(0.515)
    assert pretrain._schedule(300, recipe) == pytest.approx(0.03) == pretrain._schedule(900, recipe)


# --- the training


class Now:
    """A pool that does its work at once, and stops as by Ctrl-C at a given step."""

    stop = None

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def submit(self, work, seed, step, level):
        def result():
            if step == self.stop:
                raise KeyboardInterrupt
            return work(seed, step, level)

        return SimpleNamespace(result=result)


@pytest.fixture(scope="module")
def small():
    """A recipe of a second, checkpoints at every step, no second process."""
    clock, build = iter(range(0, 10**9, 200)), student.build_micro
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "STUDENT_RECIPE", SMALL)
        patch.setattr(pretrain, "time", SimpleNamespace(time=lambda: next(clock)))
        patch.setattr(pretrain, "ProcessPoolExecutor", Now)
        patch.setattr(student, "build_micro", lambda processor, seed: build(processor, seed, SMALL))
        yield


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of a student after four steps."""
    return pretrain.train_student(tmp_path_factory.mktemp("whole") / "student", seed=1, steps=4)


def test_what_is_shipped_has_learnt_and_can_be_loaded(whole, processor):
    weights = load_file(whole / "model.safetensors")
    before = dict(student.build_micro(processor, 1).named_parameters())
    assert weights.keys() <= before.keys()  # nothing that only training needs is shipped
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert any("visual" in name for name in moved) and any("language_model" in name for name in moved)
    loaded = student.load_student(replace(get_profile("smoke"), student=str(whole))).model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_student_comes_with_its_curve_and_a_card(whole):
    curve = json.loads((whole / "learning_curve.json").read_text())
    assert [row[0] for row in curve["rows"]] == [2, 4] and len(curve["columns"]) == len(curve["rows"][0])
    assert curve["seed"] == 1 and curve["seconds"] > 0
    card = (whole / "README.md").read_text()
    assert "--seed 1" in card and "4 steps" in card and str(whole.parent) not in card
    assert sum(path.stat().st_size for path in whole.iterdir()) < 20e6 and not list(whole.glob(".*"))


@pytest.mark.parametrize("stops", [(1,), (2, 2), (3,)])
def test_ctrl_c_and_the_same_call_again_end_on_the_same_student(whole, tmp_path, monkeypatch, stops):
    """The first two steps train the vision tower alone, so the text model has no optimiser state by then."""
    out = tmp_path / "student"
    for stop in stops:
        monkeypatch.setattr(Now, "stop", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train_student(out, seed=1, steps=4)
        state = json.loads((tmp_path / "student.training" / "state.json").read_text())
        assert state["step"] == stop and not out.exists()
    monkeypatch.setattr(Now, "stop", None)
    pretrain.train_student(out, seed=1, steps=4)
    again, weights = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    rows, wanted = (json.loads((f / "learning_curve.json").read_text())["rows"] for f in (out, whole))
    assert [row[:2] + row[3:] for row in rows] == [row[:2] + row[3:] for row in wanted]
    assert not list(tmp_path.glob(".*"))


def test_a_thing_is_added_when_the_loss_is_low_enough(small, tmp_path, monkeypatch):
    levels, first, make = [], SMALL.first_things, pretrain.make_batch
    recipe = replace(SMALL, learnt_below=99.0, things=first + 2, vision_steps=0)
    monkeypatch.setattr(pretrain, "STUDENT_RECIPE", recipe)
    monkeypatch.setattr(
        pretrain, "make_batch", lambda seed, step, level: levels.append(level) or make(seed, step, level)
    )
    pretrain.train_student(tmp_path / "out", seed=0, steps=10)
    assert levels == sorted(levels) and set(levels) == {first, first + 1, first + 2}  # and no further
    assert levels.count(first) >= SMALL.window  # not before a window has passed


def test_the_shipped_student_can_tell_the_loops_words_apart(processor):
    """Tokens that pretraining never shows drift into one direction, and no later training could part them again."""
    weights = load_file(DATA / "student" / "model.safetensors")
    embeddings = weights["model.language_model.embed_tokens.weight"]
    ids = processor.tokenizer.convert_tokens_to_ids(list(pretrain.LOOP_TOKENS))
    unit = torch.nn.functional.normalize(embeddings[ids], dim=1)
    assert len(set(ids)) == len(pretrain.LOOP_TOKENS) and processor.tokenizer.unk_token_id not in ids
    assert (unit @ unit.T - torch.eye(len(ids))).max() < 0.95
