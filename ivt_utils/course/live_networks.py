"""The student as two networks for a web page: one that sees a picture, one that reads tokens; written as ONNX.

How a box is drawn, a picture is prepared and a token is placed is part of them, so that a page knows nothing of it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, linear
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from ivt_utils.boxes import SCALE
from ivt_utils.overlay import ALPHA, OVERLAY
from ivt_utils.student import Student

OPSET = 20
LARGE = 1000  # weights of more numbers than this are stored in 16 bits; all are computed with in 32
PILLOW_SCALE = 2.0**22  # Pillow resizes bytes with whole weights, so many times the real ones


class Eyes(nn.Module):
    """What `overlay.draw_box`, the image processor and the vision tower do, for one picture of a given size.

    `forward(picture, box, part)` returns (what is shown, its features). picture: (height, width, 4) bytes, RGBA and
    opaque, as a canvas holds them. box: four integers 0..1000 that are drawn on it, or four zeros for the bare picture.
    part: the box (four integers 0..1000) of what is then cut out and enlarged, as `overlay.closer_look` does. Shown: a
    picture of the same form. Features: (image tokens, width of the language model).
    """

    x: torch.Tensor
    y: torch.Tensor
    color: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, student: Student, width: int, height: int):
        super().__init__()
        self.visual, prepare = student.model.model.visual, student.processor.image_processor
        grid = image_grid(student, width, height)
        self.patch, self.merge = prepare.patch_size, prepare.merge_size
        self.rows, self.columns = grid[0, 1:].tolist()
        self.mean, self.std = (v[0] / prepare.rescale_factor for v in (prepare.image_mean, prepare.image_std))
        self.edge = max(1, round(min(width, height) / 96))
        down, self.down_scale = shrinking(height, self.rows * self.patch)
        across, self.across_scale = shrinking(width, self.columns * self.patch)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=self.visual.num_grid_per_side,
            mode=self.visual.interpolation_mode,
            align_corners=self.visual.interpolation_align_corners,
            spatial_merge_size=self.merge,
        )
        cos, sin = self.visual.rotary_pos_emb(weights, get_vision_position_ids(grid, self.merge))
        buffers = {
            "down": down.short(),
            "across": across.T.short(),
            "color": torch.tensor([*OVERLAY, 255.0], dtype=torch.double),
            "sides": torch.tensor([width, height] * 2, dtype=torch.double),
            "x": torch.arange(width, dtype=torch.double)[None],
            "y": torch.arange(height, dtype=torch.double)[:, None],
            "places": (self.visual.pos_embed(indices) * weights[:, :, None]).sum(1),
            # A picture does not move: each patch is there twice, and the two halves of its weights add up.
            "patches": self.visual.patch_embed.proj.weight.sum(2).flatten(1).T,
            "cos": cos,
            "sin": sin,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.detach())

    def forward(self, picture, box, part):
        shown = self.enlarge(self.draw(picture.double(), box).permute(2, 0, 1), part)
        values = resized(shown[:3], self.down.double(), self.down_scale, self.across.double(), self.across_scale)
        values = (values.float() - self.mean) / self.std
        rows, columns = self.rows // self.merge, self.columns // self.merge
        cut = values.reshape(3, rows, self.merge, self.patch, columns, self.merge, self.patch)
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(self.rows * self.columns, -1)
        hidden = cut @ self.patches + self.visual.patch_embed.proj.bias + self.places
        for block in self.visual.blocks:
            hidden = hidden + self.look(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
        return shown.permute(1, 2, 0).to(torch.uint8), self.visual.merger(hidden)

    def draw(self, picture, box):
        """Return the picture with the box, filled and with an edge, pixel by pixel as Pillow draws it."""
        x, y, edge = self.x, self.y, self.edge
        left, top, right, bottom = (box.double() * self.sides / SCALE).unbind()
        right, bottom = torch.maximum(left, right - 1).floor(), torch.maximum(top, bottom - 1).floor()
        left, top = left.floor(), top.floor()
        wide, tall = (x >= left) & (x <= right), (y >= top) & (y <= bottom)
        beams = ((y >= top) & (y < top + edge) | (y <= bottom) & (y > bottom - edge)) & wide
        # Posts stand between the beams; of a box thinner than its edge, Pillow's reach beyond it.
        above, below = top + edge, bottom - edge + 1
        between = (y >= torch.minimum(above, below)) & (y <= torch.maximum(above, below)) & (y != below)
        posts = ((x >= left) & (x < left + edge) | (x <= right) & (x > right - edge)) & between
        there = box.sum() > 0
        mixed = ((self.color * ALPHA + picture * (255 - ALPHA)) / 255 + 0.5).floor()
        filled = torch.where((wide & tall & there)[..., None], mixed, picture)
        return torch.where(((beams | posts) & there)[..., None], self.color, filled)

    def enlarge(self, picture, part):
        """Return a part of the picture (4, height, width), as large as all of it, as Pillow's bicubic filter does."""
        left, top, right, bottom = (part.double() * self.sides / SCALE).float().unbind()
        down, across = enlarging(top, bottom, self.y.flatten()), enlarging(left, right, self.x.flatten())
        return resized(picture, down, PILLOW_SCALE, across.T, PILLOW_SCALE)

    def look(self, attention, hidden):
        """Return what an attention layer of the vision tower adds, among the patches of the one picture."""
        parts = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3)
        query, key = apply_rotary_pos_emb_vision(parts[0], parts[1], self.cos, self.sin)
        query, key, value = (part.transpose(0, 1) for part in (query, key, parts[2]))
        weights = (query @ key.transpose(1, 2) * attention.scaling).softmax(-1)
        return attention.proj((weights @ value).transpose(0, 1).reshape(len(hidden), -1))


class Reader(nn.Module):
    """The language model, one chat at a time; its images are those of `Eyes`.

    `forward(tokens, features, place, past)` returns (logits, place, past). tokens: (n,) integers that go on from what
    was read. features: (m, width), those of the images among the tokens, one after the other; one row of anything where
    there is none. place: (1,), the position of the first token, 0 at first. past: (layers, 2, heads, tokens read so
    far, width of a head), of no token at first. Logits: (vocabulary,), about the token after the last one. The place
    and the past that are returned are what the next call takes.
    """

    axes: torch.Tensor
    speeds: torch.Tensor

    def __init__(self, student: Student, width: int, height: int):
        super().__init__()
        config = student.model.config
        self.text, self.image_token = student.model.model.language_model, config.image_token_id
        rows, self.columns = (
            image_grid(student, width, height)[0, 1:] // config.vision_config.spatial_merge_size
        ).tolist()
        self.tokens, self.side = rows * self.columns, max(rows, self.columns)
        rotary = self.text.rotary_emb
        axes = torch.arange(3.0)[:, None, None, None].repeat(
            1, 1, 1, len(rotary.inv_freq)
        )  # t, y or x: which one turns
        self.register_buffer("axes", rotary.recomposition_frequencies(axes)[0, 0, : len(rotary.inv_freq)].long())
        self.register_buffer("speeds", rotary.inv_freq)

    def forward(self, tokens, features, place, past):
        seen = (tokens == self.image_token).long()
        number = seen.cumsum(0) - seen  # of an image's token, among those of all images
        inside = number % self.tokens * seen
        base = place + (1 - seen).cumsum(0) - (1 - seen) + number // self.tokens * self.side
        positions = torch.stack([base, base + inside // self.columns, base + inside % self.columns])
        angles = positions[self.axes].T * self.speeds
        turned = torch.cat([angles, angles], -1)[None]
        hidden = torch.where(seen.bool()[:, None], features[number * seen], self.text.embed_tokens(tokens))[None]
        known, new = past.shape[3], tokens.shape[0]
        ahead = torch.arange(known + new)[None] > (torch.arange(new) + known)[:, None]
        cache = Appended(past)
        for layer in self.text.layers:
            hidden = layer(
                hidden,
                attention_mask=torch.where(ahead, -1e9, 0.0)[None, None],
                past_key_values=cache,
                position_embeddings=(turned.cos(), turned.sin()),
            )
        logits = linear(self.text.norm(hidden[:, -1]), self.text.embed_tokens.weight)[0]  # the student ties both ends
        after = place + (1 - seen).sum() + seen.sum() // self.tokens * self.side
        return logits, after.to(torch.int32), torch.stack(cache.layers)


class Appended:
    """The part of a cache that attention asks for: the tokens read so far, and the new ones behind them."""

    def __init__(self, past):
        self.past, self.layers = past, []

    def update(self, keys, values, layer: int):
        both = torch.cat([self.past[layer][:, None], torch.stack([keys, values])], 3)
        self.layers.append(both[:, 0])
        return both[0], both[1]


def image_grid(student: Student, width: int, height: int):
    """Return the processor's `image_grid_thw` (1, 3) of a picture of this size: patches in time, rows and columns."""
    return student.processor.image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")[
        "image_grid_thw"
    ]


def resized(values, down, down_scale: float, across, across_scale: float):
    """Return bytes (channels, height, width) after two filters: rows first, and rounded to bytes after each."""
    values = (values @ across / across_scale + 0.5).floor().clamp(0, 255)
    return (down @ values / down_scale + 0.5).floor().clamp(0, 255)


def enlarging(low, high, places):
    """Return a matrix of integers, PILLOW_SCALE times the weights that spread the pixels low..high over a whole line.

    places: 0, 1, ... up to the length of the line. Pixels beside the part count, too; those beside the line do not.
    low, high: as Pillow has them, in 32 bits.
    """
    at = low.double() + (places[:, None] + 0.5) * ((high - low).double() / len(places))
    far = (places[None] + 0.5 - at).abs()
    near = (1.5 * far - 2.5) * far * far + 1
    weights = torch.where(far < 1, near, torch.where(far < 2, -0.5 * (((far - 5) * far + 8) * far - 4), 0.0))
    weights = weights / weights.sum(1, keepdim=True) * PILLOW_SCALE
    return (weights.abs() + 0.5).floor() * weights.sign()


def shrinking(before: int, after: int):
    """Return (matrix (after, before) of integers, scale): they resize a line of bytes as torch's bicubic filter does.

    Torch computes with bytes in integers, and with the finest scale at which no weight exceeds 15 bits.
    """
    line = torch.eye(before)[None, :, None]
    weights = interpolate(line, (1, after), mode="bicubic", antialias=True)[0, :, 0].T.double()
    bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + weights.max() * 2 ** (bits + 1)) >= 2**15)
    return (weights.abs() * 2**bits + 0.5).floor() * weights.sign(), float(2**bits)


def export(networks: Mapping[Path, nn.Module], inputs: dict, outputs: list[str], free: dict[str, int]) -> None:
    """Write networks of one class as ONNX, each to its path. The first is traced, the others differ in their weights.

    inputs: {name: an example}, in order; free: {name: its axis of any length}.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shapes = tuple({free[name]: torch.export.Dim.AUTO} if name in free else None for name in inputs)
    with torch.no_grad():
        program = torch.onnx.export(
            next(iter(networks.values())).eval(),
            tuple(inputs.values()),
            input_names=[*inputs],
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            optimize=False,  # so that weights keep their names; the runtime does it, too
            verbose=False,
        )
    assert program is not None
    traced = program.model_proto
    for part in (traced.graph, *traced.graph.node):  # what they say of our folders and code
        del part.metadata_props[:]
    del traced.graph.value_info[:]  # shapes, which the runtime finds by itself
    names = [weights.name for weights in traced.graph.initializer]
    del traced.graph.initializer[:]
    for path, network in networks.items():
        model = onnx.ModelProto()
        parts = network.named_parameters, network.named_buffers
        weights = dict(pair for part in parts for pair in part(remove_duplicate=False))
        model.CopyFrom(traced)
        for name in names:
            values, stored = weights[name].detach().numpy(), name
            if values.dtype == "float32" and values.size > LARGE:
                values, stored = values.astype("float16"), f"{name}.16"
                model.graph.node.insert(0, helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
            model.graph.initializer.append(numpy_helper.from_array(values, stored))
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


def write_eyes(student: Student, width: int, height: int, path: Path) -> None:
    """Write `Eyes` as ONNX: "picture", "box" and "part" to "shown" and "features"."""
    box = torch.arange(4).int()
    inputs = {"picture": torch.zeros(height, width, 4, dtype=torch.uint8), "box": box, "part": box + 1}
    export({path: Eyes(student, width, height)}, inputs, ["shown", "features"], {})


def write_readers(students: dict[Path, Student], width: int, height: int) -> None:
    """Write a `Reader` for each: "tokens", "features", "place", "past" to "logits", "next_place", "next_past"."""
    text = next(iter(students.values())).model.config.text_config
    inputs = {
        "tokens": torch.arange(5).int(),
        "features": torch.zeros(7, text.hidden_size),
        "place": torch.tensor([3]).int(),
        "past": torch.zeros(text.num_hidden_layers, 2, text.num_key_value_heads, 4, text.head_dim),
    }
    free = {"tokens": 0, "features": 0, "past": 3}
    readers = {path: Reader(student, width, height) for path, student in students.items()}
    export(readers, inputs, ["logits", "next_place", "next_past"], free)
