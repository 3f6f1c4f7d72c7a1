"""Synthetic explanations that resemble a trained model's, for the tests of the page and the plots."""

import base64
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

IMAGE = Path(__file__).parents[2] / "docs" / "coffee.jpg"
WIDTH, HEIGHT = 600, 400
LAYERS, HEADS, GRID, BEAMS = 12, 12, 24, 3
CAPTION = """a white cup of black coffee stands on a wooden table next to a small silver spoon and a green saucer , seen
from above in soft daylight""".split()
OTHERS = "mug plate tea dark glass brown sits near large gold under lies beside bowl red".split()
OBJECTS = {"cup": (285, 42, 680, 712), "saucer": (130, 160, 800, 968), "spoon": (543, 165, 708, 815)}
WORD_IDS = 1000


def caption() -> dict[str, Any]:
    """Return a caption of thirty tokens, `<s>` and `</s>` among them."""
    words = ["<s>", CAPTION[0], *(f" {word}" for word in CAPTION[1:]), ".", "</s>"]
    answer = {"kind": "text", "text": "".join(words[1:-1])}
    return explanation("<CAPTION>", "What does the image describe?", words, answer)


def detection() -> dict[str, Any]:
    """Three labelled boxes."""
    words, boxes = ["<s>"], []
    for label, bins in OBJECTS.items():
        first = len(words)
        words += [label, *(f"<loc_{bin}>" for bin in bins)]
        xyxy = [(bin + 0.5) * side / 1000 for bin, side in zip(bins, (WIDTH, HEIGHT) * 2, strict=True)]
        boxes.append({"label": label, "xyxy": xyxy, "score": 0.8, "tokens": [first, len(words) - 1]})
    answer = {"kind": "boxes", "text": "".join(words[1:]), "boxes": boxes}
    return explanation("<OD>", "Locate the objects with category name in the image.", [*words, "</s>"], answer)


def explanation(task: str, sentence: str, words: list[str], answer: dict[str, Any]) -> dict[str, Any]:
    """Return the explanation of an answer that consists of `words`."""
    rng = np.random.default_rng(len(words))
    prompt = ["<s>", *(f" {word}" for word in sentence.split()), "</s>"]
    steps = beams(words, rng)
    return {
        "format": 1,
        "model": {"name": "synthetic", "layers": LAYERS, "heads": HEADS, "vision": "synthetic"},
        "image": {"width": WIDTH, "height": HEIGHT, "grid": [GRID, GRID], "pooled": 1, "data": image()},
        "task": task,
        "prompt": [{"id": i, "text": text} for i, text in enumerate(prompt)],
        "answer": {"score": 0.71, "finish_reason": "stop", "boxes": [], "quads": [], "polygons": [], **answer},
        "tokens": [token(i, word, len(prompt), rng) for i, word in enumerate(words)],
        "beams": steps,
        "winner": [0] * len(words),
    }


@lru_cache
def image() -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(IMAGE.read_bytes()).decode()}"


def token(number: int, word: str, prompt: int, rng: np.random.Generator) -> dict[str, Any]:
    chosen = float(rng.uniform(0.3, 0.99))
    bin = int(word[5:-1]) if word.startswith("<loc_") else None
    rest = (1 - chosen) * np.array([0.5, 0.2, 0.1, 0.08, 0.05, 0.02, 0.01])
    near = [f"<loc_{bin + i}>" for i in (-1, 1, 2, -2, 3, -3, 4)] if bin else rng.choice(OTHERS, 7, replace=False)
    choices = [(word, chosen), *zip(near, rest.tolist(), strict=True)]
    return {
        "id": id_of(word),
        "text": word,
        "probability": round(chosen, 4),
        "location": bin,
        "alternatives": [alternative(text, share) for text, share in choices],
        "banned": [{"rule": "forced_bos_token", "count": 51288, "texts": ["everything but <s>"]}]
        if number == 0
        else repeated(number),
        "lens": lens(word, chosen, rng),
        "attention": attention(prompt, rng),
        "saliency": {
            "image": encoded(blob(rng, 2.0)),
            "prompt": [round(float(share), 4) for share in rng.uniform(-0.1, 1, prompt)],
        },
        "spread": spread(bin) if bin is not None else None,
    }


def repeated(number: int) -> list[dict[str, Any]]:
    return [{"rule": "no_repeat_ngram", "count": 1, "texts": [" a"]}] if number % 5 == 4 else []


def id_of(word: str) -> int:
    return WORD_IDS + zlib.crc32(str(word).encode()) % 40000


def alternative(text: str, probability: float) -> dict[str, Any]:
    return {"id": id_of(str(text)), "text": str(text), "probability": round(probability, 4)}


def lens(word: str, chosen: float, rng: np.random.Generator) -> list[list[dict[str, Any]]]:
    """Return the embedding and every layer; the chosen word rises in the upper half."""
    rows = []
    for layer in range(LAYERS + 1):
        share = chosen * max(0.0, 2 * layer / LAYERS - 1) ** 2
        guesses = [(str(text), float(rng.uniform(0.02, 0.2))) for text in rng.choice(OTHERS, 3, replace=False)]
        if share > 0:
            guesses[2] = (word, share)
        guesses.sort(key=lambda guess: -guess[1])
        rows.append([{"text": text, "probability": round(value, 4)} for text, value in guesses])
    return rows


def attention(prompt: int, rng: np.random.Generator) -> dict[str, Any]:
    """Heads that attend to one or two places, and a few that attend everywhere."""
    maps, peaks, shares, prompts = [], [], [], []
    for _ in range(LAYERS):
        row = [
            blob(rng, rng.uniform(0.8, 4)) + blob(rng, 1.5) * rng.uniform(0, 0.6) + rng.uniform(0, 0.08, (GRID, GRID))
            for _ in range(HEADS)
        ]
        share = rng.uniform(0.4, 0.98, HEADS)
        maps.append([encoded(one) for one in row])
        peaks.append([round(float(s * one.max() / one.sum()), 6) for s, one in zip(share, row, strict=True)])
        shares.append([round(float(s), 4) for s in share])
        prompts.append([rng.integers(0, 120, prompt).tolist() for _ in range(HEADS)])
    return {"peak": peaks, "image": shares, "maps": maps, "prompt": prompts, "rollout": encoded(blob(rng, 3.0))}


def blob(rng: np.random.Generator, size: float) -> np.ndarray:
    y, x = np.mgrid[:GRID, :GRID]
    top, left = rng.uniform(3, GRID - 3, 2)
    bump: np.ndarray = np.exp(-((y - top) ** 2 + (x - left) ** 2) / (2 * size**2))
    return bump


def encoded(values: np.ndarray) -> str:
    return base64.b64encode(np.rint(255 * values / values.max()).astype(np.uint8).tobytes()).decode()


def spread(bin: int) -> dict[str, Any]:
    bins = range(max(0, bin - 18), min(1000, bin + 19))
    weights = [math.exp(-(((other - bin) / 5) ** 2)) for other in bins]
    shares = [[other, round(0.95 * weight / sum(weights), 4)] for other, weight in zip(bins, weights, strict=True)]
    return {"bins": shares, "mean": bin + 0.4, "std": 3.6}


def beams(words: list[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return a search that finds `words`: three beams, six candidates a step; the winner is always the best of them."""
    alive: list[tuple[int, float]] = [(0, 0.0)]  # (beam, sum), the winner first
    steps = []
    for number, word in enumerate(words):
        found = continuations(word, alive, rng)
        candidates, alive = survive(found, number == len(words) - 1)
        bans = [{"rule": "no_repeat_ngram", "beam": 1, "count": 2, "texts": [" a", " of"]}] if number % 5 == 4 else []
        steps.append({"step": number, "candidates": candidates, "bans": bans})
    return steps


def continuations(word: str, alive: list[tuple[int, float]], rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for beam, total in alive:
        count = 2 * BEAMS // len(alive)
        texts = [f" {text}" for text in rng.choice(OTHERS, count, replace=False)]
        losses = np.sort(rng.uniform(0.5, 2.5, count)).tolist()
        if beam == 0:
            texts[0], losses[0] = word, 0.05
        elif rng.random() < 0.2:
            texts[-1] = "</s>"
        found += [
            {"token": id_of(text), "text": text, "parent": beam, "sum": round(total - loss, 4)}
            for text, loss in zip(texts, losses, strict=True)
        ]
    return sorted(found, key=lambda candidate: -candidate["sum"])


def survive(found: list[dict[str, Any]], last: bool) -> tuple[list[dict[str, Any]], list[tuple[int, float]]]:
    alive: list[tuple[int, float]] = []
    candidates = []
    for rank, candidate in enumerate(found):
        beam = None
        if candidate["text"] == "</s>":
            fate = "finished" if rank < BEAMS else "ended low"
        elif len(alive) < BEAMS:
            fate, beam = "stopped" if last else "lives", len(alive)
            alive.append((beam, candidate["sum"]))
        else:
            fate = "dropped"
        candidates.append({**candidate, "beam": beam, "fate": fate})
    return candidates, alive
