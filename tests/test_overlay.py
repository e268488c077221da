"""Pictures: any image file gives an RGB image or one sentence, and a box is only ever drawn on the original."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ivt_utils import overlay
from ivt_utils.show import figures


def picture(width=40, height=30) -> Image.Image:
    return Image.merge("RGB", [Image.linear_gradient("L").resize((width, height)).rotate(90 * i) for i in range(3)])


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sentence(caught) -> str:
    message = str(caught.value)
    assert message.startswith(("The image", "There is no image")) and "\n" not in message
    return message


# --- loading


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
)
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    gray = picture().convert("L")
    source = Image.new("LAB", gray.size) if mode == "LAB" else gray.convert(mode)
    image = overlay.load_image(source)
    assert image.mode == "RGB" and image.size == (40, 30)
    if mode in ("L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        assert abs(np.asarray(image, int) - np.asarray(gray, int)[..., None]).max() < 12


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("PPM", {}),
    ],
)
def test_files_and_bytes_of_the_usual_kinds(kind, options, tmp_path):
    content = encoded(picture(), kind, **options)
    (tmp_path / "image").write_bytes(content)
    from_bytes, from_path = overlay.load_image(content), overlay.load_image(tmp_path / "image")
    assert from_bytes.tobytes() == from_path.tobytes() == overlay.load_image(str(tmp_path / "image")).tobytes()
    assert from_bytes.size == (40, 30) and from_bytes.mode == "RGB"


def test_what_is_transparent_becomes_white():
    see_through = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    assert overlay.load_image(see_through).getpixel((5, 5)) == (255, 255, 255)
    half = Image.new("LA", (10, 10), (0, 128))
    assert overlay.load_image(half).getpixel((5, 5)) == pytest.approx((127, 127, 127), abs=1)
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    content = encoded(palette, "PNG", transparency=0)
    assert overlay.load_image(content).getpixel((5, 5)) == (255, 255, 255)
    for mode, clear in (("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)):
        content = encoded(Image.new(mode, (10, 10)), "PNG", transparency=clear)
        assert overlay.load_image(content).size == (10, 10)


def test_sixteen_bits_a_pixel_are_scaled_to_eight():
    ramp = np.linspace(0, 65535, 400).astype("uint16").reshape(20, 20)
    image = overlay.load_image(encoded(Image.fromarray(ramp), "PNG"))
    assert abs(np.asarray(image, int)[..., 0] - ramp // 256).max() <= 1


def test_cmyk_and_palette_files():
    cmyk = encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG")
    red = overlay.load_image(cmyk).getpixel((9, 9))
    assert red[0] > 200 and max(red[1:]) < 60
    palette = picture().quantize(16)
    from_file = overlay.load_image(encoded(palette, "PNG"))
    assert from_file.tobytes() == palette.convert("RGB").tobytes() and len(from_file.getcolors()) > 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file_is_one_sentence(kind, part):
    content = encoded(picture(300, 200), kind)
    with pytest.raises(overlay.ImageError) as caught:
        overlay.load_image(content[: int(len(content) * part)])
    assert "cannot be read" in sentence(caught)


def test_a_truncated_picture_that_pillow_has_opened_is_one_sentence():
    content = encoded(picture(300, 200), "JPEG")
    lazy = Image.open(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(overlay.ImageError) as caught:
        overlay.load_image(lazy)
    assert "cannot be read" in sentence(caught)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"GIF89a", b"<svg/>", b"{}", b"P6\n4x0 30 255\n"])
def test_what_is_no_image_is_one_sentence(content, tmp_path):
    (tmp_path / "file.jpg").write_bytes(content)
    for source in (content, tmp_path / "file.jpg"):
        with pytest.raises(overlay.ImageError) as caught:
            overlay.load_image(source)
        assert "cannot be read" in sentence(caught) and "0x" not in sentence(caught)


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path):
    with pytest.raises(overlay.ImageError, match="There is no image at .*gone.png"):
        overlay.load_image(tmp_path / "gone.png")
    with pytest.raises(overlay.ImageError) as caught:
        overlay.load_image(tmp_path)
    sentence(caught)


@pytest.mark.parametrize(
    "size, why",
    [
        ((1, 1), "1 x 1 pixels"),
        ((1, 300), "at least 8"),
        ((7, 100), "7 x 100"),
        ((8, 2400), "at most 100 times"),
        ((3000, 10), "3000 x 10"),
    ],
)
def test_an_image_of_no_use_is_one_sentence(size, why):
    with pytest.raises(overlay.ImageError) as caught:
        overlay.load_image(Image.new("RGB", size))
    assert why in sentence(caught)


@pytest.mark.parametrize("size", [(8, 8), (8, 800), (1000, 10)])
def test_small_and_long_images_within_the_limits_are_used(size, processor):
    image = overlay.load_image(Image.new("L", size))
    assert image.size == size
    assert processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].tolist()


def test_a_decompression_bomb_is_one_sentence(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(overlay.ImageError) as caught:
        overlay.load_image(encoded(picture(300, 200), "PNG"))
    assert "too large" in sentence(caught)


@settings(max_examples=150)
@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_file_with_wrong_bytes_gives_an_image_or_one_sentence(kind, damage):
    content = bytearray(encoded(picture(), kind))
    for where, value in damage:
        content[int(where * len(content))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own remarks on damaged files
        try:
            assert overlay.load_image(bytes(content)).mode == "RGB"
        except overlay.ImageError as error:
            assert "\n" not in str(error)


def test_loading_gives_a_copy(records):
    image = records[0]["image"]
    loaded = overlay.load_image(image)
    loaded.paste((0, 0, 0), (0, 0, 50, 50))
    assert image.tobytes() != loaded.tobytes()


# --- drawing


@pytest.fixture
def gray():
    return Image.new("RGB", (200, 100), (128, 128, 128))


def touched(before, after):
    """The pixels that differ, as (left, top, right, bottom)."""
    ys, xs = np.nonzero(np.any(np.asarray(before) != np.asarray(after), -1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize("style", ["filled", "outline"])
def test_a_box_changes_its_own_pixels_and_no_other(style, gray):
    drawn = overlay.draw_box(gray, (100, 200, 600, 800), style)
    assert drawn.mode == "RGB" and drawn.size == gray.size
    assert touched(gray, drawn) == (20, 20, 120, 80)
    assert drawn.getpixel((20, 50)) == drawn.getpixel((119, 79)) == (255, 0, 0)
    inside = drawn.getpixel((70, 50))
    assert inside == (128, 128, 128) if style == "outline" else inside[0] > 150 and 60 < inside[1] < 128


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True),
    st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True),
    st.sampled_from(["filled", "outline"]),
    st.integers(8, 64),
    st.integers(8, 64),
)
def test_any_box_leaves_a_mark_within_a_pixel_of_its_place(xs, ys, style, width, height):
    image = Image.new("RGB", (width, height), (128, 128, 128))
    box = min(xs), min(ys), max(xs), max(ys)
    left, top, right, bottom = touched(image, overlay.draw_box(image, box, style))
    scaled = [v * size / 1000 for v, size in zip(box, (width, height) * 2, strict=True)]
    assert left >= scaled[0] - 1 and top >= scaled[1] - 1
    slack = 1 if min(scaled[2] - scaled[0], scaled[3] - scaled[1]) >= 2 else 2  # Pillow's thinnest rectangles
    assert right <= scaled[2] + slack and bottom <= scaled[3] + slack


def test_drawing_leaves_the_image_alone_and_never_draws_box_on_box(records):
    image = records[0]["image"]
    before = image.tobytes()
    first = overlay.draw_box(image, (0, 0, 300, 300))
    second = overlay.draw_box(image, (600, 600, 900, 900))
    assert image.tobytes() == before
    assert second.tobytes() == overlay.draw_box(image.copy(), (600, 600, 900, 900)).tobytes()
    assert touched(image, second)[0] >= 100 and touched(image, first)[2] <= 60  # 192 pixels a side


def test_no_box_or_the_style_none_gives_the_bare_image_as_a_copy(gray):
    for bare in (overlay.draw_box(gray, None), overlay.draw_box(gray, (0, 0, 500, 500), "none")):
        assert bare is not gray and bare.tobytes() == gray.tobytes()


@pytest.mark.parametrize("style", ["", "Filled", "dotted", None])
@pytest.mark.parametrize("box", [None, (0, 0, 10, 10)])
def test_an_unknown_style_is_one_sentence_with_the_choices(style, box, gray):
    with pytest.raises(ValueError, match="filled, outline, none"):
        overlay.draw_box(gray, box, style)


# --- strips


@pytest.fixture
def rollouts(records):
    return [
        {
            **{k: r[k] for k in ("id", "image_id", "subset", "expression")},
            "truth": r["bbox"],
            "steps": [
                {"text": "", "box": (0, 0, 500, 500)},
                {"text": "", "box": None},
                {"text": "", "box": (0, 0, 9, 9)},
            ],
        }
        for r in records[:2]
    ]


@pytest.fixture
def strip(records, rollouts):
    """`strip(style)`: the figure, closed at the end."""
    import matplotlib.pyplot as plt

    yield lambda **style: figures.trajectory_strip(records, rollouts, "A title", **style)
    plt.close("all")


def test_a_strip_shows_each_step_of_each_rollout(records, strip):
    figure = strip()
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 6 and titles[1] == titles[4] == "step 1: no box in the answer"
    assert all(title.startswith(f"step {i % 3}") for i, title in enumerate(titles))
    assert [len(ax.patches) for ax in figure.axes] == [2, 1, 2] * 2  # the truth, and the answer if there is one
    assert records[0]["expression"] in figure.axes[0].get_xlabel()


def test_a_filling_may_be_more_opaque_than_the_usual_one():
    image, box = Image.new("RGB", (100, 100)), (100, 100, 900, 900)
    styles = ("filled:0", "filled", "filled:255")
    inside = [overlay.draw_box(image, box, style).getpixel((50, 50))[0] for style in styles]
    assert inside == [0, overlay.ALPHA, 255]
    with pytest.raises(ValueError, match="no box style 'filled:much'"):
        overlay.draw_box(image, box, "filled:much")


@pytest.mark.parametrize("style", overlay.STYLES)
def test_a_strip_shows_what_the_student_was_shown_before_each_answer(style, records, rollouts, strip):
    figure = strip(style=style)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    for row, (record, rollout) in enumerate(zip(records, rollouts, strict=False)):
        before = [None, *(step["box"] for step in rollout["steps"][:-1])]  # nothing is drawn on the first picture
        for step, box in enumerate(before):
            assert np.array_equal(shown[3 * row + step], overlay.draw_box(record["image"], box, style))
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["ground truth", "answer", "shown: the last answer"][: 2 + (style != "none")]
