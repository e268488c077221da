"""The benchmark: whole, balanced, split by image, rebuilt from its seed, and every expression true in its scene."""

import hashlib
import io
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat
from pyarrow import parquet
from test_scenes import pointed_at

from ivt_utils import records as data
from ivt_utils.micro import benchmark, scenes
from ivt_utils.micro.model import expression_words
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ArtefactError, read_json

SIZES = {"train": 2400, "val": 510, "test": 505}


@pytest.fixture(scope="module")
def shipped():
    """{split: rows} as they lie in the files, images as encoded bytes."""
    return {split: parquet.read_table(data.BENCHMARK / f"{split}.parquet").to_pylist() for split in SIZES}


def sentence(caught) -> str:
    """The message of an error, which must be one sentence that says what to do."""
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


# --- what is shipped


def test_sizes_and_balance(shipped):
    assert {split: len(rows) for split, rows in shipped.items()} == SIZES
    for rows in shipped.values():
        counts = Counter(row["subset"] for row in rows)
        assert set(counts) == set(scenes.SUBSETS) and max(counts.values()) - min(counts.values()) <= 1


def test_schema(shipped):
    for split, rows in shipped.items():
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert set(row) == {"id", "image_id", "image", "expression", "bbox", "subset"}
            assert row["id"].rpartition("-")[0] == row["image_id"] and row["image_id"].startswith(f"{split}-")
            x1, y1, x2, y2 = row["bbox"]
            assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


def test_splits_share_no_image(shipped):
    names, contents = {}, {}
    for split, rows in shipped.items():
        for row in rows:
            digest = hashlib.sha256(row["image"]["bytes"]).hexdigest()
            assert names.setdefault(row["image_id"], (split, digest)) == (split, digest)
            assert contents.setdefault(digest, row["image_id"]) == row["image_id"]  # no picture under two names
    assert len({split for split, _ in names.values()}) == 3


def test_an_image_is_asked_about_at_most_twice_and_never_the_same(shipped):
    for rows in shipped.values():
        asked = Counter(row["image_id"] for row in rows)
        assert max(asked.values()) == benchmark.QUESTIONS
        assert len({(row["image_id"], row["expression"]) for row in rows}) == len(rows)


@pytest.mark.slow
def test_every_expression_is_unique_in_its_scene_by_a_second_implementation(shipped):
    """The scenes are made again from the seed; the words and boxes are those of the files."""
    seed = read_json(data.BENCHMARK / "manifest.json")["seed"]
    made = {}
    for rows in shipped.values():
        for row in rows:
            if row["image_id"] not in made:
                made[row["image_id"]] = benchmark.scene_of(row["image_id"], seed)[0]
            things = made[row["image_id"]].things
            target = [i for i, t in enumerate(things) if np.allclose(t.box, row["bbox"], atol=0.01)]
            for margin in (25, 90):
                assert pointed_at(row["expression"], things, margin) == target, row


def test_every_word_is_in_the_students_vocabulary(shipped):
    known = {word.strip() for word in expression_words()}
    assert {w for rows in shipped.values() for row in rows for w in row["expression"].split()} <= known


def test_images_are_small_rgb_jpegs(shipped):
    for rows in shipped.values():
        for row in rows[::50]:
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (192, 192))


# --- made again


@pytest.mark.parametrize("split", SIZES)
def test_the_first_records_can_be_made_again(split, shipped):
    known = {row["id"]: row for row in shipped[split]}
    again = benchmark.sample_split(split, 12, seed=read_json(data.BENCHMARK / "manifest.json")["seed"])
    assert Counter(record["subset"] for record in again) == dict.fromkeys(scenes.SUBSETS, 4)
    for record in again:
        row = known[record["id"]]
        assert {k: record[k] for k in ("image_id", "expression", "subset")} == {
            k: row[k] for k in ("image_id", "expression", "subset")
        }
        assert record["bbox"] == pytest.approx(row["bbox"], abs=1e-3)
        pictures = [Image.open(io.BytesIO(r["image"]["bytes"])) for r in (record, row)]
        assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11])
def test_any_size_is_balanced_to_one_and_depends_on_the_seed_alone(size):
    first, second = benchmark.sample_split("val", size, 5), benchmark.sample_split("val", size, 5)
    assert first == second and len(first) == size
    counts = [sum(r["subset"] == subset for r in first) for subset in scenes.SUBSETS]
    assert max(counts) - min(counts) <= 1
    assert [r["expression"] for r in benchmark.sample_split("val", size, 6)] != [r["expression"] for r in first]


def test_a_benchmark_is_built_with_a_manifest_and_the_same_bytes_twice(tmp_path, monkeypatch):
    tiny = replace(get_profile("micro"), train=5, val=4, test=3)
    monkeypatch.setattr(benchmark, "get_profile", lambda name: tiny)
    for name in ("a", "b"):
        assert benchmark.build_benchmark(tmp_path / name, seed=3) == tmp_path / name
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["manifest.json", "test.parquet", "train.parquet", "val.parquet"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    rows = data.load_split(tiny, "val", tmp_path / "a")
    assert len(rows) == 4 and rows[0]["image"].size == (192, 192)


# --- loading


@pytest.fixture
def copied(tmp_path):
    for name in ("test.parquet", "manifest.json"):
        shutil.copy(data.BENCHMARK / name, tmp_path / name)
    return tmp_path


def test_a_split_is_loaded_as_records_and_as_many_as_the_profile_says(shipped):
    smoke = get_profile("smoke")
    rows = data.load_split(smoke, "test")
    assert len(rows) == smoke.test and [row["id"] for row in rows] == [r["id"] for r in shipped["test"][: smoke.test]]
    assert rows[0]["image"].mode == "RGB" and rows[0]["image"].size == (192, 192)
    assert rows[0]["bbox"] == pytest.approx(shipped["test"][0]["bbox"])
    assert len(data.load_split(replace(smoke, test=10_000), "test")) == 505
    assert len(data.load_split(get_profile("micro"), "val")) == 510


def test_a_flipped_byte_is_found(copied):
    path = copied / "test.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError) as caught:
        data.load_split(get_profile("micro"), "test", copied)
    assert "test.parquet is missing or damaged" in sentence(caught) and "restore it" in sentence(caught)


@pytest.mark.parametrize("broken", ["test.parquet", "manifest.json"])
def test_a_missing_file_is_one_sentence(copied, broken):
    (copied / broken).unlink()
    with pytest.raises(ArtefactError) as caught:
        data.load_split(get_profile("micro"), "test", copied)
    assert broken in sentence(caught) and "missing" in sentence(caught)


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"files": {}}', "[]"])
def test_a_damaged_manifest_is_one_sentence(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(ArtefactError) as caught:
        data.load_split(get_profile("micro"), "test", copied)
    assert str(copied) in sentence(caught)


@pytest.mark.parametrize("split", ["", "validation", "../test", None])
def test_an_unknown_split_is_one_sentence_with_the_choices(split):
    with pytest.raises(ValueError) as caught:
        data.load_split(get_profile("micro"), split)
    assert "train, val, test" in sentence(caught)


@pytest.mark.parametrize("name", ["colab", "paper"])
def test_a_profile_with_data_from_the_hub_says_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HUB", tmp_path)
    with pytest.raises(ArtefactError) as caught:
        data.load_split(get_profile(name), "train")
    assert f"ivt data --profile {name}" in sentence(caught) and str(tmp_path / name) in sentence(caught)
