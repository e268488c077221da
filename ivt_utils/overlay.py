"""What the student is shown and what the reader is shown: the box drawn on the image, and strips of a trajectory."""

import io
from pathlib import Path

from PIL import Image, ImageDraw

from ivt_utils.boxes import to_pixels, view

STYLES = ("filled", "outline", "none")
OVERLAY, ALPHA = (255, 0, 0), 80  # red, and how opaque it fills a box, of 255
COLORS = {"truth": "#009E73", "answer": "#D55E00"}  # readable with color-blind eyes
MAX_ASPECT = 100  # Qwen's image processor refuses 200


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that says why."""


def load_image(source) -> Image.Image:
    """Return an RGB image from a path, bytes or a PIL image of any mode (CMYK, palette, gray, alpha on white).

    Raises ImageError for a missing, unreadable or truncated file, for fewer than 8 pixels on a side, and for an
    aspect ratio beyond 100.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
        image.load()
    except FileNotFoundError:
        raise ImageError(f"There is no image at {source}.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow has all four for a damaged file
        raise ImageError("The image cannot be read; it is truncated, too large or of no known kind.") from None
    width, height = image.size
    if min(width, height) < 8:
        raise ImageError(f"The image is {width} x {height} pixels; at least 8 on each side are needed.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"The image is {width} x {height} pixels; a side may be at most {MAX_ASPECT} times the other.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode.startswith("I;16"):  # 16 bits a pixel: keep the upper eight, where convert() would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("RGB")


def draw_box(image: Image.Image, box, style: str = "filled") -> Image.Image:
    """Return a copy of the image with a 0..1000 box drawn on it in red (section 3 of the paper: an overlay).

    `filled`: semi-transparent with an edge, `filled:120` more opaque (of 255); `outline`: the edge alone; `none`, or a
    box that is None: the bare image.
    """
    kind, _, alpha = str(style).partition(":")
    opaque = kind == "filled" and alpha.isdecimal() and int(alpha) <= 255
    if kind not in STYLES or style != kind and not opaque:
        raise ValueError(
            f"There is no box style {style!r}; choose one of {', '.join(STYLES)}, or filled:N with N from 0 to 255."
        )
    if box is None or style == "none":
        return image.copy()
    x1, y1, x2, y2 = to_pixels(box, *image.size)
    corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    edge = max(1, round(min(image.size) / 96))
    overlay = Image.new("RGBA", image.size, (0, 0, 0, 0))
    fill = (*OVERLAY, int(alpha or ALPHA)) if kind == "filled" else None
    ImageDraw.Draw(overlay).rectangle(corners, fill=fill, outline=(*OVERLAY, 255), width=edge)
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")


def closer_look(image: Image.Image, box, zoom: float, least: int) -> Image.Image:
    """Return the part of the image around a 0..1000 box that `boxes.view` names, enlarged to the image's size."""
    return image.resize(image.size, Image.Resampling.BICUBIC, box=to_pixels(view(box, zoom, least), *image.size))
