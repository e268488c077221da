"""Which rows of several sets are drawn, and into which split: exact counts, even thirds, and no image on two sides."""

import random
from itertools import zip_longest

from ivt_utils.runtime.files import ArtefactError

CAPS = (2, 4, 8, 10**9)  # expressions of one image that a set gives: more only when the counts need it


def choose(rows: list[dict], sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Return {split: rows} with exactly `sizes[split]` rows each; the same for the same rows, sizes and seed.

    A row has "image_id", "expression" and "source" (with `.subset`). The set with the fewest rows is served first and
    gives its share of every split; what it cannot give, the others do. An image, with all of its expressions in all
    sets, is on one side only. Raises an ArtefactError when the counts cannot be reached.
    """
    rng = random.Random(f"hub {seed}")
    sets = grouped(rows)
    sides: dict[str, str] = {}
    parts_of_split: dict[str, list[list[dict]]] = {split: [] for split in sizes}
    order = sorted(sets, key=lambda subset: (sum(map(len, sets[subset])), subset))
    for served, subset in enumerate(order):
        groups = sets[subset]
        rng.shuffle(groups)
        for group in groups:
            rng.shuffle(group)
        room = {split: size - sum(map(len, parts_of_split[split])) for split, size in sizes.items()}
        share = {split: count // (len(order) - served) for split, count in room.items()}
        for taken in attempts(groups, share, sides):
            if all(len(taken[split]) == count for split, count in share.items()):
                break
        for split, part in taken.items():
            parts_of_split[split].append(part)
            sides |= {row["image_id"]: split for row in part}
    for split, parts in parts_of_split.items():
        if sum(map(len, parts)) != sizes[split]:
            raise ArtefactError(
                f"The sets give {sum(map(len, parts))} of the {sizes[split]} records of the split "
                f"{split!r} when no image may be on two sides; ask for fewer."
            )
    for parts in parts_of_split.values():
        for part in parts:
            rng.shuffle(part)
    return {
        split: [row for turn in zip_longest(*parts) for row in turn if row] for split, parts in parts_of_split.items()
    }


def grouped(rows: list[dict]) -> dict[str, list[list[dict]]]:
    """Return {subset: groups}, a group being the rows about one image; an expression counts once for an image."""
    sets: dict[str, dict[str, list]] = {}
    seen = set()
    for row in rows:
        if (row["image_id"], row["expression"]) not in seen:
            seen.add((row["image_id"], row["expression"]))
            sets.setdefault(row["source"].subset, {}).setdefault(row["image_id"], []).append(row)
    return {subset: list(images.values()) for subset, images in sets.items()}


def attempts(groups: list[list[dict]], share: dict[str, int], sides: dict[str, str]):
    """Yield ways to fill the shares from one set, the best for variety first, the one that wastes least last.

    Large groups first leave the images with one expression for the end, where they fill a share to the last row.
    """
    for cap in CAPS:
        yield fill(groups, share, sides, cap)
    yield fill(sorted(groups, key=len, reverse=True), share, sides, CAPS[-1])


def fill(groups: list[list[dict]], share: dict[str, int], sides: dict[str, str], cap: int) -> dict[str, list[dict]]:
    """Return {split: rows}, at most the shares: each image goes where it is already, or where most is missing."""
    taken: dict[str, list[dict]] = {split: [] for split in share}
    for group in groups:
        group = group[:cap]
        room = {split: count - len(taken[split]) for split, count in share.items()}
        side = sides.get(group[0]["image_id"])
        if side is None:
            fitting = [split for split in share if room[split] >= len(group)] or list(share)
            side = max(fitting, key=lambda split: room[split] / max(1, share[split]))
        taken[side] += group[: room[side]]
    return taken
