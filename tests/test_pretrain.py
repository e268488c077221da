"""The micro student's training: the loss on the answers and its guides, and a stop that changes nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ivt_utils import protocol, student
from ivt_utils.micro import chats, pretrain, scenes
from ivt_utils.micro import model as micro
from ivt_utils.profiles import STUDENT_RECIPE, get_profile

BEGIN = STUDENT_RECIPE.vision_steps  # the first step of the text model
SMALL = replace(
    STUDENT_RECIPE, batch_size=2, text_layers=1, vision_layers=2, words_after=1, points_in=0, window=2, vision_steps=2
)


# --- the loss


def test_the_loss_of_the_image_tokens_is_zero_for_a_perfect_guess_and_not_otherwise():
    """Tokens that are the words' own embeddings, here unit vectors: six colors, then five shapes."""
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


@pytest.fixture(scope="module")
def guided(processor):
    """A fresh student as the training holds it, a batch of its chats, and the words."""
    model = micro.build_micro(processor, 0).eval()
    model.set_attn_implementation({"text_config": "eager"})
    words = torch.tensor(processor.tokenizer.convert_tokens_to_ids(micro.expression_words()))
    return model, *chats.make_batch(0, BEGIN + 5, 8), words


def test_the_loss_is_that_of_the_whole_model_on_the_answers_and_the_three_guides(guided, processor):
    model, batch, labels, words = guided
    tokenizer, again = processor.tokenizer, labels["again"]
    with torch.no_grad():
        loss, (coordinate, binding, said, shown, copying, copied) = pretrain._loss(
            model, batch, labels, tokenizer, words
        )
        mask = chats.answer_mask(batch["input_ids"], tokenizer)
        attention = batch["input_ids"] != tokenizer.pad_token_id
        logits = model(**batch, attention_mask=attention, use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1][mask[:, 1:]], batch["input_ids"][mask], reduction="none")
    recipe = STUDENT_RECIPE
    guides = recipe.word_weight * said + recipe.point_weight * shown + recipe.copy_weight * copying
    assert float(loss) == pytest.approx(float(wanted.mean()) + guides, rel=1e-4)
    assert min(said, shown, copying) > 0 and 0 < again.sum() < len(again)
    numbers = wanted.view(-1, 7)[:, 1:5]  # opening, four numbers, closing, end of the turn
    assert copied == pytest.approx(float(numbers[again].mean()), rel=1e-4)
    numbers = numbers[~again].mean(0)
    assert coordinate == pytest.approx(float(numbers.mean()), rel=1e-4)
    assert binding == pytest.approx(float(numbers[0] - numbers[1]), rel=1e-3)


def test_the_guides_are_zero_for_a_student_that_says_the_words_and_looks_at_the_right_places(guided, processor):
    """The model's outputs are replaced by perfect ones; then one answer alone looks elsewhere."""
    model, batch, labels, words = guided
    tokenizer, recipe, again = processor.tokenizer, STUDENT_RECIPE, labels["again"]
    row, at = chats.answer_mask(batch["input_ids"], tokenizer)[:, 1:].nonzero().view(-1, 7, 2).unbind(-1)
    size = tuple(batch["input_ids"].shape)
    states = torch.zeros(*size, len(words))
    states[row[:, 1], at[:, 1]] = labels["said"].clamp(min=1e-30).log()  # its softmax is the share of each word
    looks = torch.zeros(size[0], 4, size[1], size[1])
    share = labels["shown"] / labels["shown"].sum(1, keepdim=True)
    looks[row[:, 1:5], 0, at[:, 1:5]] = share[:, None].expand(-1, 4, -1)
    ids = batch["input_ids"]
    for copy in again.nonzero()[:, 0].tolist():
        here, there = at[copy, 1:5], at[copy - 1, 1:5] + 1  # predicted from `here`, the number itself lies at `there`
        chat = ids[row[copy, 0]]
        assert row[copy, 0] == row[copy - 1, 0] and torch.equal(chat[here + 1], chat[there])
        looks[row[copy, 1:5], recipe.copy_head, here, there] = 1.0

    def guides():
        output = SimpleNamespace(
            last_hidden_state=torch.zeros(*size, 1),
            hidden_states=[None] * recipe.words_after + [states],
            attentions=[None] * recipe.points_in + [looks],
        )
        stand_in = SimpleNamespace(
            model=lambda **_: output,
            lm_head=SimpleNamespace(weight=torch.zeros(len(tokenizer), 1)),
            get_input_embeddings=lambda: lambda _: torch.eye(len(words)),
        )
        return pretrain._loss(stand_in, batch, labels, tokenizer, words)[1][2:5]

    assert guides() == pytest.approx([0, 0, 0], abs=1e-4)
    one, other = (~again).nonzero()[:2, 0].tolist()
    looks[row[one, 1], 0, at[one, 1]] = 0.0  # x1 of the first answer looks at nothing
    states[row[other, 1], at[other, 1]] = 0.0  # the second answer says every word alike
    copy = int(again.nonzero()[0])
    looks[row[copy, 4], recipe.copy_head, at[copy, 4]] = 0.0
    states[row[copy, 1], at[copy, 1]] = 0.0  # the guide of words is for new answers
    said, shown, copying = guides()
    assert shown == pytest.approx(13.8155 / (4 * int((~again).sum())), rel=1e-3) and said > 0.01
    assert copying == pytest.approx(13.8155 / (4 * int(again.sum())), rel=1e-3)


def test_what_no_answer_holds_keeps_its_rows_apart(guided, processor):
    """The softmax may not move the rows of words that no answer holds: it would push all of them the same way."""
    model, batch, labels, words = guided
    pretrain._loss(model, batch, labels, processor.tokenizer, words)[0].backward()
    moved = model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    model.zero_grad()
    known = set(batch["input_ids"].flatten().tolist()) | set(words.tolist())
    known |= {*chats.answer_tokens(processor.tokenizer), processor.tokenizer.eos_token_id}
    assert set(moved.nonzero()[:, 0].tolist()) <= known and moved.sum() < len(moved)


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
def small(slow):
    """A recipe of a second, checkpoints at every step, no second process."""
    clock, build = iter(range(0, 10**9, 200)), micro.build_micro
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "STUDENT_RECIPE", SMALL)
        patch.setattr(chats, "STUDENT_RECIPE", SMALL)
        patch.setattr(pretrain, "time", SimpleNamespace(time=lambda: next(clock)))
        patch.setattr(pretrain, "ProcessPoolExecutor", Now)
        patch.setattr(micro, "build_micro", lambda processor, seed: build(processor, seed, SMALL))
        yield


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of a student after four steps."""
    return pretrain.train_student(tmp_path_factory.mktemp("whole") / "student", seed=1, steps=4)


def test_what_is_shipped_has_learnt_and_can_be_loaded(whole, processor):
    weights = load_file(whole / "model.safetensors")
    before = dict(micro.build_micro(processor, 1).named_parameters())
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
    """The first two steps train the vision tower alone, so the text model has no optimizer state by then."""
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


def test_the_shipped_student_can_tell_the_loops_words_apart():
    """Tokens that a softmax pushes away drift into one direction, and no later training could part them again."""
    shipped = student.load_student(get_profile("micro"))
    said = [protocol.FEEDBACK, protocol.FEEDBACK_NO_BOX, protocol.TRACE_OPENS, protocol.TRACE_FITS]
    said += [f" {words}" for pair in protocol.PROBLEMS.items() for words in pair]
    ids = sorted({token for text in said for token in shipped.processor.tokenizer.encode(text)})
    unit = torch.nn.functional.normalize(shipped.model.get_input_embeddings().weight[ids].detach(), dim=1)
    assert shipped.processor.tokenizer.unk_token_id not in ids
    assert (unit @ unit.T - torch.eye(len(ids))).max() < 0.95
