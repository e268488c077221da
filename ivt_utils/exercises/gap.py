"""The exercises of notebook 1: the overlap of two boxes, what the student is shown, and from pixels to 0..1000."""

from math import floor

from PIL import Image, ImageDraw

from ivt_utils.boxes import to_pixels
from ivt_utils.exercises import Exercise


def my_iou(a, b):
    """Return the area that two boxes (x1, y1, x2, y2) share over the area that they cover together, 0.0 to 1.0."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (areas - overlap)


def my_overlays(image, boxes):
    """Return one picture for each box (x1, y1, x2, y2), 0..1000: a copy of the PIL image, this box in red."""
    pictures = []
    for box in boxes:
        picture = image.copy()
        corners = [round(v) for v in to_pixels(box, *picture.size)]
        ImageDraw.Draw(picture).rectangle(corners, outline="red", width=1)
        pictures.append(picture)
    return pictures


def my_from_pixels(box, width, height):
    """Return a box (x1, y1, x2, y2) in pixels as four integers 0..1000, halves rounded up, clipped to the image."""
    sizes = width, height, width, height
    rounded = [floor(v * 1000 / size + 0.5) for v, size in zip(box, sizes)]
    return [min(1000, max(0, v)) for v in rounded]


# ------------------------------------------------------------------------------------------------ random arguments
def random_box(rng, most: int = 1000, least: int = 0) -> tuple[int, int, int, int]:
    """Return a box of integers from `least` to `most`, at least 1 wide and high."""
    x1, x2 = sorted(rng.sample(range(least, most + 1), 2))
    y1, y2 = sorted(rng.sample(range(least, most + 1), 2))
    return x1, y1, x2, y2


def _pair(rng):
    """Return two boxes: any two, or equal, touching, apart in both directions, near to each other, one in another."""
    a = x1, y1, x2, y2 = random_box(rng, 600)
    near = [max(0, v + rng.randint(-side // 4, side // 4)) for v, side in zip(a, (x2 - x1, y2 - y1) * 2)]
    right, below = rng.randint(1, 200), rng.randint(1, 200)
    b = rng.choice(
        [
            random_box(rng),
            a,
            (x2, y1, x2 + right, y2 + below),
            (x1, y2, x2, y2 + below),
            (x2 + right, y2 + below, x2 + 2 * right, y2 + 2 * below),
            tuple(near),
            tuple(near),
            (x1, y1, x1 + (x2 - x1 + 1) // 2, y2),
        ]
    )
    return rng.choice([(a, b), (b, a), (list(a), list(b))])


def _on_pixels(rng):
    """Return a box in pixels, often beyond the edges, with an image size of which it cuts exact halves of 1/1000."""
    # Sizes that floats divide exactly, or never into halves: the order of the arithmetic must not decide.
    width, height = rng.sample([64, 128, 512, 1024, 333, 427, 641], 2)
    (x1, x2), (y1, y2) = (sorted(rng.sample(range(-size // 4, size + size // 4), 2)) for size in (width, height))
    return (x1, y1, x2, y2), width, height


def _shown(rng):
    """Return an image and one to three boxes, some pixels wide and high, with no corner half way between two pixels."""
    size = rng.randint(40, 90), rng.randint(40, 90)
    image = Image.new("RGB", size, tuple(rng.randrange(200) for _ in range(3)))
    boxes, count = [], rng.randint(1, 3)
    while len(boxes) < count:
        box = random_box(rng, 980)
        clear = all(abs(v % 1 - 0.5) > 0.05 for v in to_pixels(box, *size))
        if clear and min(box[2] - box[0], box[3] - box[1]) >= 100:
            boxes.append(box)
    return image, boxes


# ------------------------------------------------------------------------------------------------ known mistakes
def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _unclipped(a, b):
    overlap = (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / (_area(a) + _area(b) - overlap)


def _clipped_late(a, b):
    overlap = max(0, (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1])))
    return overlap / (_area(a) + _area(b) - overlap)


def _counted_pixels(a, b):
    a, b = ((x1, y1, x2 + 1, y2 + 1) for x1, y1, x2, y2 in (a, b))
    return my_iou(a, b)


def _sides(a, b):
    a, b = ((x, y, x + width, y + height) for x, y, width, height in (a, b))
    return my_iou(a, b)


def _hull(a, b):
    return _overlap(a, b) / ((max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1])))


def _thousandths(box, width, height):
    return [v * 1000 / size for v, size in zip(box, (width, height) * 2)]


def _clipped(box, most=1000):
    return [min(most, max(0, v)) for v in box]


def _drawn(image, boxes, pixels=to_pixels, whole=round, fill=None, width=1):
    pictures = []
    for box in boxes:
        picture = image.copy()
        corners = [whole(v) for v in pixels(box, *picture.size)]
        ImageDraw.Draw(picture).rectangle(corners, outline="red", fill=fill, width=width)
        pictures.append(picture)
    return pictures


def _on_the_image(image, boxes, keep):
    pictures = []
    for box in boxes:
        ImageDraw.Draw(image).rectangle([round(v) for v in to_pixels(box, *image.size)], outline="red")
        pictures.append(keep(image))
    return pictures


EXERCISES = (
    Exercise(
        title="the overlap of two boxes",
        minutes=6,
        task="""
            Every score in this course rests on the **IoU** (intersection over union): the area that two boxes share,
            divided by the area that they cover together. An answer counts as right when its IoU with the truth is at
            least 0.5. Write it for two boxes `(x1, y1, x2, y2)` in the same unit, with x1 < x2 and y1 < y2.
            A box has IoU 1.0 with itself, and 0.0 with a box that it does not overlap or only touches. For
            `(0, 0, 200, 100)` and `(100, 0, 300, 100)` a third is shared: 0.333.
        """,
        hints=(
            "Draw two boxes that overlap. Which of the two left edges is the left edge of the shared part?",
            """The shared part runs from the larger x1 to the smaller x2, and likewise in y. If that length is negative,
            there is no shared part: take 0 instead. The two areas together count the shared part twice: subtract it
            once.""",
            """Width of the shared part: `max(0, min(a[2], b[2]) - max(a[0], b[0]))`. Its height is the same with 3 and
            1 in place of 2 and 0. With `overlap = width * height` return
            `overlap / (area_of_a + area_of_b - overlap)`.""",
        ),
        solution=my_iou,
        inputs=_pair,
        mistakes={
            "Your overlap is negative in width or height where the boxes do not touch: hold both at 0.": _unclipped,
            "You let two negative sides make a positive area: hold each side at 0, not their product.": _clipped_late,
            "You divide by the sum of the two areas, which counts the overlap twice.": lambda a, b: (
                _overlap(a, b) / (_area(a) + _area(b))
            ),
            "You divide by the area of one box only, not by the area that both cover together.": lambda a, b: (
                _overlap(a, b) / _area(a)
            ),
            "You divide by the smallest box around both, not by the area that they cover.": _hull,
            "Your IoU treats 0..1000 as counted pixels: it adds 1 to every side.": _counted_pixels,
            "You read a box as (x, y, width, height); here it is (x1, y1, x2, y2).": _sides,
        },
    ),
    Exercise(
        title="draw the overlay",
        minutes=6,
        task="""
            After every answer the loop shows the student **the original image with its latest box**, never box on box.
            Return a list with one new picture for each box: a copy of `image` (a PIL image) with this one box as an
            outline in `"red"`, 1 pixel wide. The boxes are 0..1000, and `to_pixels(box, width, height)` gives the four
            numbers in pixels. They are the corners of the rectangle, each rounded to the nearest integer; `round` will
            do, as no halves occur here. (The loop also fills the box with a see-through red, by the course's own
            `draw_box`.)
        """,
        hints=(
            "`image.copy()` is a new picture. `ImageDraw.Draw(picture)` lets you draw on it.",
            """For each box: make a fresh copy of the image, turn the box into pixels of `image.size` (which is width,
            height), round them, draw the rectangle on the copy, and put the copy into the list.""",
            """In a loop over `boxes`: `picture = image.copy()`, then
            `corners = [round(v) for v in to_pixels(box, *picture.size)]`, then
            `ImageDraw.Draw(picture).rectangle(corners, outline="red", width=1)`, then `pictures.append(picture)`.""",
        ),
        solution=my_overlays,
        inputs=_shown,
        imports="from PIL import ImageDraw\nfrom ivt_utils.boxes import to_pixels",
        mistakes={
            "You draw on one and the same picture, so all pictures in your list hold all the boxes.": lambda image, boxes: (
                _on_the_image(image, boxes, lambda picture: picture)
            ),
            "You draw box on box: each picture still holds the boxes before it. Begin with a fresh copy each time.": lambda image, boxes: (
                _on_the_image(image, boxes, Image.Image.copy)
            ),
            "You treat 0..1000 as pixels.": lambda *call: _drawn(*call, pixels=lambda box, width, height: box),
            "You swap width and height: x runs along the width, y along the height.": lambda *call: _drawn(
                *call, pixels=lambda box, width, height: to_pixels(box, height, width)
            ),
            "Your outline is not 1 pixel wide.": lambda *call: _drawn(*call, width=2),
            "You do not round the corners, but cut off what follows the decimal point, as PIL does with floats.": lambda *call: (
                _drawn(*call, whole=int)
            ),
            "You fill the box; draw its outline only, so that the object stays visible.": lambda *call: _drawn(
                *call, fill="red"
            ),
        },
    ),
    Exercise(
        title="from pixels to 0..1000",
        minutes=5,
        task="""
            This exercise is optional. In most data sets the true boxes come in pixels, and the student answers in
            0..1000. Return the pixel box as four integers 0..1000 of an image of `width` x `height` pixels. Round to
            the nearest integer, and halves up: 62.5 becomes 63. A box may reach over the edge of the image: then clip
            it, so that no number is below 0 or above 1000.
        """,
        hints=(
            "This is `to_pixels` above, solved for the other side. And what does Python give for `round(62.5)`?",
            """Divide by the side, multiply by 1000. Python's `round` takes halves to the even number, so round with
            `floor` of the number plus a half. Clip last.""",
            """With `sizes = width, height, width, height` walk over `zip(box, sizes)` and take
            `floor(v * 1000 / size + 0.5)` of each number `v`. Then keep it in the range with
            `min(1000, max(0, v))`.""",
        ),
        solution=my_from_pixels,
        inputs=_on_pixels,
        imports="from math import floor",
        mistakes={
            "You round with `round`, which takes halves to the even number: 62.5 to 62.": lambda *call: _clipped(
                [round(v) for v in _thousandths(*call)]
            ),
            "You cut off what follows the decimal point instead of rounding.": lambda *call: _clipped(
                [int(v) for v in _thousandths(*call)]
            ),
            "You do not clip: a box that reaches over the edge leaves 0..1000.": lambda *call: [
                floor(v + 0.5) for v in _thousandths(*call)
            ],
            "You clip at 999; the scale ends at 1000.": lambda *call: _clipped(
                [floor(v + 0.5) for v in _thousandths(*call)], 999
            ),
            "You swap width and height: x runs along the width, y along the height.": lambda box, width, height: (
                my_from_pixels(box, height, width)
            ),
            "You go the other way, from 0..1000 to pixels.": lambda *call: _clipped(
                [floor(v + 0.5) for v in to_pixels(*call)]
            ),
            "You do not round; the answer holds integers.": lambda *call: _clipped(_thousandths(*call)),
        },
    ),
)
