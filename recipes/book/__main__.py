"""`python -m recipes.book`: make the drawings, tables and listings of docs/how-it-works again."""

import argparse
import json

import torch

from recipes.book.blocks import BOOK, fill
from recipes.book.figures import DRAWINGS
from recipes.book.overview import THEMES, draw_overview
from recipes.book.values import CHAPTERS, load_nano, summarise

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m recipes.book", description=__doc__).parse_args()
    torch.set_num_threads(1)  # numbers are then the same on machines with other cores
    f, summaries = load_nano(), {}
    for chapter, measure in CHAPTERS.items():
        values = measure(f)
        summaries[chapter] = summarise(values)
        DRAWINGS[chapter](values).savefig(BOOK / f"{chapter}.png", metadata={"Software": None})
    for name, theme in THEMES.items():
        (BOOK.parent / name).write_text(draw_overview(theme), encoding="utf-8")
    (BOOK / "figures.json").write_text(json.dumps(summaries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in sorted(BOOK.glob("*.md")):
        page.write_text(fill(page.read_text(encoding="utf-8"), f), encoding="utf-8")
