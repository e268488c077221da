"""The micro student: real Qwen3-VL classes, a small vocabulary, and a folder that loads or says what is wrong."""

import shutil
from dataclasses import replace

import pytest
import torch

from ivt_utils import protocol, student
from ivt_utils.loop import evaluate
from ivt_utils.metrics import iou_matrix
from ivt_utils.micro import model as micro
from ivt_utils.profiles import STUDENT_RECIPE, get_profile
from ivt_utils.records import load_split
from ivt_utils.runtime.files import ArtefactError, note_files
from ivt_utils.runtime.store import REFERENCE


def test_the_classes_are_those_of_the_papers_model(tiny_student):
    assert type(tiny_student.model).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(tiny_student.processor).__name__ == "Qwen3VLProcessor"
    parameters = sum(p.numel() for p in tiny_student.model.parameters())
    assert 1e6 < parameters < 4e6 and parameters * 4 < 20e6  # bytes of the shipped safetensors


def test_the_vocabulary_is_small_and_says_each_token_once(processor):
    tokens = micro.vocabulary([*micro.expression_words(), *micro.follow_up_words()])
    assert len(tokens) == len(set(tokens)) == len(processor.tokenizer) < 400
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokens)))
    assert set(protocol.PROMPT) < set(tokens)


def test_the_special_tokens_are_qwens(processor, tiny_student):
    tokenizer, config = processor.tokenizer, tiny_student.model.config
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tiny_student.model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("size", [(192, 192), (96, 96), (400, 400)])
def test_a_square_image_is_36_tokens(processor, size):
    from PIL import Image

    grid = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 12, 12]] and int(grid.prod()) // 4 == 36


def test_a_seed_gives_the_same_weights(processor):
    one, two, other = (micro.build_micro(processor, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_near_numbers_start_near_each_other(tiny_student):
    tokenizer = tiny_student.processor.tokenizer
    embed = tiny_student.model.get_input_embeddings().weight
    for form in ("{}", ", {}"):
        rows = embed[[tokenizer.convert_tokens_to_ids(form.format(v)) for v in range(0, 1001, 10)]]
        near, far = (rows[:-1] - rows[1:]).norm(dim=1), (rows[:-50] - rows[50:]).norm(dim=1)
        assert 1.2 < far.mean() / near.mean() < 2  # though each has a direction of its own
    assert tiny_student.model.lm_head.weight is embed


def test_one_head_starts_as_a_copier(tiny_student):
    """What it looks at, it says: its value and output maps together are a projection, scaled."""
    attention = tiny_student.model.model.language_model.layers[STUDENT_RECIPE.points_in].self_attn
    width, head = attention.head_dim, STUDENT_RECIPE.copy_head
    here = slice(head * width, (head + 1) * width)
    value, output = attention.v_proj.weight[here], attention.o_proj.weight[:, here]
    assert torch.allclose(output, STUDENT_RECIPE.copy_scale * value.T)
    assert torch.allclose(value @ value.T, torch.eye(width), atol=1e-5)


def test_rotary_frequencies_fill_half_a_head():
    for half in (8, 16, 24, 64):
        assert sum(micro._mrope_section(half)) == half and min(micro._mrope_section(half)) > 0


# --- loading


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, processor):
    """A student's folder with random weights, and a profile that names it."""
    folder = tmp_path_factory.mktemp("student") / "student"
    micro.build_micro(processor, seed=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    note_files(folder, student.FILES)
    return folder, replace(get_profile("smoke"), student=str(folder))


def test_a_loaded_student_answers_as_it_did_when_it_was_saved(shipped, processor, records):
    made = student.Student(micro.build_micro(processor, seed=3).eval(), processor, micro.GRID)
    loaded = student.load_student(shipped[1])
    assert loaded.grid == 10 and not loaded.model.training
    a, b = (evaluate(s, records[:2], get_profile("micro"), turns=1, max_new_tokens=6) for s in (made, loaded))
    assert a == b
    assert loaded.processor.chat_template == protocol.chat_template()
    assert loaded.processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def copy(shipped, tmp_path):
    shutil.copytree(shipped[0], tmp_path / "student")
    return tmp_path / "student", replace(shipped[1], student=str(tmp_path / "student"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "bad manifest", "no folder"])
def test_a_missing_or_damaged_student_is_one_sentence(shipped, tmp_path, damage):
    folder, profile = copy(shipped, tmp_path)
    weights = folder / "model.safetensors"
    if damage in ("flip", "truncate"):
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content if damage == "flip" else content[:-9])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "bad manifest":
        (folder / "manifest.json").write_text("{}")
    else:
        profile = replace(profile, student=str(tmp_path / "elsewhere"))
    with pytest.raises(ArtefactError) as caught:
        student.load_student(profile)
    assert "\n" not in str(caught.value) and "restore it from where it came" in str(caught.value)


def test_a_missing_adapter_is_one_sentence(shipped, tmp_path):
    with pytest.raises(ArtefactError, match="There is no adapter in .*nothing; run the notebook"):
        student.load_student(shipped[1], tmp_path / "nothing")


@pytest.mark.slow
def test_an_adapter_is_loaded_frozen_or_trainable(shipped, tmp_path):
    from peft import get_peft_model

    made = get_peft_model(student.load_student(shipped[1]).model, student.lora(shipped[1]))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "adapter")
    words, scores = torch.arange(5, 25)[None], {}
    for trainable in (False, True):
        model = student.load_student(shipped[1], tmp_path / "adapter", trainable=trainable).model
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert bool(learning) == trainable and all("lora_" in name for name in learning)
        assert hasattr(model, "peft_config") == trainable  # a frozen adapter is merged, and says the same
        with torch.inference_mode():
            scores[trainable] = model(input_ids=words).logits
    assert torch.allclose(scores[True], scores[False], atol=1e-3)
    with torch.inference_mode():
        untrained = student.load_student(shipped[1]).model(input_ids=words).logits
    assert not torch.allclose(untrained, scores[False], atol=1e-1)


@pytest.fixture
def of_the_hub(shipped, tmp_path, monkeypatch):
    """A profile whose student is taken for one of the Hub: it lies in the working folder, and is named from there."""
    shutil.copytree(shipped[0], tmp_path / "owner" / "student")
    monkeypatch.chdir(tmp_path)
    return replace(shipped[1], student="owner/student", student_revision=40 * "a")


@pytest.mark.slow
def test_a_frozen_adapter_in_16_bits_is_merged_and_says_what_the_training_computes(of_the_hub, tmp_path, monkeypatch):
    from peft import get_peft_model
    from safetensors.torch import load_file

    monkeypatch.setattr(student.hardware, "precision", lambda: "bfloat16")
    made = get_peft_model(student.load_student(of_the_hub).model, student.lora(of_the_hub)).float()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "adapter")
    saved, words, scores = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), torch.arange(5, 25)[None], {}
    for trainable in (True, False):
        model = student.load_student(of_the_hub, tmp_path / "adapter", trainable).model
        weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
        assert hasattr(model, "peft_config") == bool(weights) == trainable
        for name, weight in saved.items() if trainable else ():
            assert torch.equal(weights[name.removesuffix("weight") + "default.weight"], weight)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=trainable):
            scores[trainable] = model(input_ids=words).logits.float()
    assert torch.allclose(scores[True], scores[False], atol=0.1)  # of logits up to 7


def test_in_float16_the_student_is_tried_on_images_of_the_data(of_the_hub, monkeypatch):
    tried = []
    monkeypatch.setattr(student, "check_finite", lambda made, records: tried.append(records["id"]))
    for kind in ("float32", "float16"):
        monkeypatch.setattr(student.hardware, "precision", lambda kind=kind: kind)
        student.load_student(of_the_hub)
    assert tried == [load_split(of_the_hub, "val")["id"][: of_the_hub.batch_size]]


def test_a_student_of_the_hub_is_loaded_in_the_revision_of_its_profile(of_the_hub, monkeypatch):
    import transformers

    asked = []
    for kind in (transformers.Qwen3VLForConditionalGeneration, transformers.AutoProcessor):

        def loaded(name, *_, own=kind.from_pretrained, **options):
            asked.append(options.get("revision"))
            return own(name, *_, **options)

        monkeypatch.setattr(kind, "from_pretrained", loaded)
    student.load_student(of_the_hub)
    assert asked == [40 * "a"] * 2
    for unpinned in ("", "main", 40 * "g"):
        with pytest.raises(ArtefactError, match="does not say which owner/student it means: give its student_revision"):
            student.load_student(replace(of_the_hub, student_revision=unpinned))


def test_the_recipe_is_used_for_the_model(processor):
    small = replace(STUDENT_RECIPE, text_layers=2, points_in=1, vision_layers=2, text_width=64, vision_width=32)
    config = micro.build_micro(processor, 0, small).config
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (2, 64)
    assert (config.vision_config.depth, config.vision_config.hidden_size) == (2, 32)


def test_words_have_their_space_and_every_word_of_an_expression_is_there():
    words = micro.expression_words()
    assert words[0] == "the" and " the" in words and all(word[0] == " " for word in words[1:])


def test_the_shipped_student_answers_with_boxes_and_mostly_right_ones():
    from ivt_utils import loop, metrics, records
    from ivt_utils.profiles import get_profile

    profile = get_profile("smoke")
    val = records.load_split(profile, "val")
    rollouts = loop.evaluate(student.load_student(profile), val, profile, turns=0)
    assert metrics.parsed_matrix(rollouts).all() and (metrics.iou_matrix(rollouts) >= 0.5).mean() > 0.6


@pytest.mark.slow
def test_merging_changes_nothing_in_float32_and_in_bfloat16_no_more_than_bfloat16_does(shipped):
    from peft import PeftModel

    profile, (texts, scores) = shipped[1], ({}, {})
    records = load_split(get_profile("micro"), "val").select(range(24))
    for kind in (torch.float32, torch.bfloat16):
        for merged in (False, True):
            own = student.load_student(profile)
            model = PeftModel.from_pretrained(own.model, str(REFERENCE / "adapters" / "sft")).to(kind).eval()
            own.model = model.merge_and_unload() if merged else model
            rollouts = evaluate(own, records, get_profile("micro"))
            texts[kind, merged] = [step["text"] for rollout in rollouts for step in rollout["steps"]]
            scores[kind, merged] = iou_matrix(rollouts).mean(axis=0)
    assert texts[torch.float32, True] == texts[torch.float32, False]

    def changed(*pair):
        return sum(a != b for a, b in zip(*(texts[key] for key in pair), strict=True))

    by_merging = changed((torch.bfloat16, True), (torch.bfloat16, False))
    by_rounding = changed((torch.bfloat16, False), (torch.float32, False))
    assert 0 < by_merging <= 2 * by_rounding
    assert abs(scores[torch.bfloat16, True] - scores[torch.bfloat16, False]).max() < 0.01
