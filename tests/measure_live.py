"""Measure the page Try it, and write the tables of docs/live.md: python tests/measure_live.py (two minutes).

Run it on an idle machine, after `ivt build live`. Browser: this machine's Chromium.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from conftest import chromium
from test_live import LOOP, PROFILE, lay_out, rollouts_of, same_answers, static_server, student_of

from ivt_utils.course import live
from ivt_utils.records import load_split
from ivt_utils.runtime import hardware
from ivt_utils.runtime.files import ROOT
from ivt_utils.runtime.text import markdown_table, write_between

SAMPLES = 170  # of the validation split, three answers to each


def sizes(built: Path) -> list[list[str]]:
    """Return rows of (part, MB)."""
    parts = {"ONNX Runtime": live.RUNTIME_FILES, "the eyes of all students": (live.EYES,)}
    parts |= {f"the student *{label}*": (f"{name}.onnx",) for name, (label, _) in live.STUDENTS.items()}
    parts |= {f"the words, and {live.SCENES} scenes": (live.WORDS,)}
    spent = {part: sum((built / name).stat().st_size for name in names) for part, names in parts.items()}
    return [[part, f"{size / 1e6:.1f}"] for part, size in {**spent, "together": sum(spent.values())}.items()]


def measure(built: Path = live.LIVE) -> None:
    assert live.is_current(built), "run: ivt build live"
    torch.set_num_threads(1)
    records, rows = load_split(PROFILE, "val").select(range(SAMPLES)), []
    asked = [{"image": live.as_png(r["image"]), "questions": [{"expression": r["expression"]}]} for r in records]
    for name, (label, _) in live.STUDENTS.items():
        with (
            TemporaryDirectory() as folder,
            chromium() as browser,
            static_server(lay_out(built, Path(folder))) as address,
        ):
            page, version = browser.new_page(), browser.version
            page.goto(f"{address}/index.html")
            page.wait_for_selector("#live-ask:enabled")
            loops = page.evaluate(LOOP, [name, asked, PROFILE.turns])
        same = same_answers(loops, rollouts_of(student_of(name), name, records, PROFILE.turns))
        first, later = loops[0]["seconds"][0], [second for loop in loops for second in loop["seconds"][1:]]
        equal = f"{sum(same)} of {len(same)}"
        rows.append([label, equal, f"{first:.1f} s", f"{np.median(later):.2f} s", f"{max(later):.2f} s"])
        print(*rows[-1], sep=" | ")
    head = ["student", "answers as in PyTorch", "first answer", "later answers (median)", "the slowest"]
    tables = f"{markdown_table(['part', 'MB'], sizes(built))}\n\n{markdown_table(head, rows)}"
    machine = f"{hardware.usable_cores()} cores of {hardware.processor()}, in Chromium {version}"
    write_between(ROOT / "docs" / "live.md", "measured", f"{tables}\n\nMeasured on {machine}.\n")


if __name__ == "__main__":
    measure()
