"""Time one checkout of this project: `PYTHONPATH=CHECKOUT python compare_worker.py SPEC`.

`benchmarks.compare` runs this file by its path, with the florence2 package of either checkout. It therefore uses only
the public API, which every version shares. SPEC is a JSON object: `checkout`, `folder` (a checkpoint), `images` (JPEG
files; all make the batch), `scenes` (image files for mixed questions, or none), `tokens`, `repeats`, `threads`. It
prints one JSON object: `seconds`, `bytes`, `tokens`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ["<OD>", "<CAPTION>", "<OCR>", "<DENSE_REGION_CAPTION>"]
MIXED = ["<CAPTION>", "<OCR>", "<OD>"]
"""Their answers differ in length: each ends where the model ends it."""
SHORT = 8
"""Length of the short answer. The long answer minus the short one gives the time of the steps in between."""


class Clocks:
    """The seconds of every clock's runs, in order."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], Any], *, per: int = 1, warm: bool = True) -> Any:
        """Time `work` `repeats` times, after a run that does not count if `warm`. A time is divided by `per`."""
        result = work() if warm else None
        for _ in range(self.repeats if warm else 1):
            start = time.perf_counter()
            result = work()
            self.seconds.setdefault(name, []).append((time.perf_counter() - start) / per)
        return result


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run every clock on the florence2 package that PYTHONPATH names."""
    clocks = Clocks(spec["repeats"])
    import torch

    torch.set_num_threads(spec["threads"])
    florence2 = clocks.time("import, beyond torch's own", _import_whole, warm=False)
    if not Path(florence2.__file__).is_relative_to(Path(spec["checkout"]).resolve()):
        raise SystemExit(f"florence2 was imported from {florence2.__file__}, not from {spec['checkout']}.")
    f = clocks.time("load", lambda: florence2.load(spec["folder"], device="cpu", dtype="float32"), warm=False)
    with torch.inference_mode():
        tokens, peaks = _time_answers(f, spec, clocks)
        tokens += _time_mixed(f, spec, clocks)
        tokens.append(_time_stages(florence2, f, spec, clocks))
    return {"seconds": clocks.seconds, "bytes": peaks, "tokens": tokens}


def _import_whole() -> Any:
    """Import the package with all that loading a model needs; names may be imported on first use."""
    package = __import__("florence2")
    assert package.load
    return package


def _time_answers(f: Any, spec: dict[str, Any], clocks: Clocks) -> tuple[list[list[int]], dict[str, int]]:
    """Time whole answers: one, four tasks on one image, a batch of images. Also read the peak memory."""
    images, options, peaks = spec["images"], _exactly(f, spec["tokens"]), {}
    answer = clocks.time("image file to answer", lambda: f.run(TASKS[0], images[0], options=options))
    peaks["peak memory, one answer"] = _peak_memory()

    def four_tasks() -> Any:
        encoded = f.encode_image(images[0])
        return f.run_batch([(task, encoded) for task in TASKS], options=options)

    def batch() -> Any:
        return f.run_batch([(TASKS[0], image) for image in images], options=options, batch_size=len(images))

    answers = [answer, *clocks.time("four tasks, one image", four_tasks)]
    answers += clocks.time(f"batch of {len(images)}, per image", batch, per=len(images))
    peaks[f"peak memory, batch of {len(images)}"] = _peak_memory()
    return [list(map(int, answer.token_ids)) for answer in answers], peaks


def _time_mixed(f: Any, spec: dict[str, Any], clocks: Clocks) -> list[list[int]]:
    """Time up to 8 questions, and one about every scene, by `run_batch` as it stands, from encoded images."""
    images, answers = [f.encode_image(scene) for scene in spec["scenes"]], []
    options = _without_confidence(f)
    requests = [(MIXED[i % len(MIXED)], image) for i, image in enumerate(images)]
    for count in sorted({min(8, len(requests)), len(requests)}) if requests else ():
        name, work = (
            f"{count} mixed questions, each",
            lambda count=count: f.run_batch(requests[:count], options=options),
        )
        answers += clocks.time(name, work, per=count)
    return [list(map(int, answer.token_ids)) for answer in answers]


def _time_stages(florence2: Any, f: Any, spec: dict[str, Any], clocks: Clocks) -> list[int]:
    """Time the stages of one answer and return its ids."""
    import torch

    pixels = f.processor.image(spec["images"][0])
    prompt = torch.tensor([f.processor.prompt(TASKS[0])])
    features = clocks.time("vision tower", lambda: f.model.encode_image(pixels))
    memory = clocks.time("encoder", lambda: f.model.encode(features, prompt))

    def generate(length: int) -> Any:
        return florence2.generate(f.model, memory, _exactly(f, length)).sequences[0].tolist()

    clocks.time("first step", lambda: generate(1))
    clocks.time("short answer", lambda: generate(SHORT))
    ids: list[int] = clocks.time("long answer", lambda: generate(spec["tokens"]))
    pairs = zip(clocks.seconds.pop("long answer"), clocks.seconds.pop("short answer"), strict=True)
    clocks.seconds["decode step"] = [(long - short) / (spec["tokens"] - SHORT) for long, short in pairs]
    return ids


def _exactly(f: Any, tokens: int) -> Any:
    """Return the options for an answer of exactly `tokens` tokens from three beams."""
    return _without_confidence(f, num_beams=3, no_repeat_ngram_size=3, max_new_tokens=tokens, min_new_tokens=tokens - 1)


def _without_confidence(f: Any, **settings: Any) -> Any:
    """Return options without a confidence, which older versions do not compute."""
    return f.options(**settings, **({"confidence": False} if hasattr(f.options(), "confidence") else {}))


def _peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # the other files of this folder must not shadow any module
    print(json.dumps(measure(json.loads(sys.argv[1]))))
