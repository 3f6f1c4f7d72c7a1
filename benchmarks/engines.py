"""Run one engine in its own process: load it, run the clocks, print their times as JSON.

`benchmarks.speed` starts `python -m benchmarks.engines SPEC`; SPEC is a JSON object (see `Spec`).
"""

import io
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Spec:
    """One engine's work. Every answer has exactly `tokens` tokens; all `jpegs` make the batch."""

    engine: str
    folder: str
    jpegs: list[str]
    device: str = "cpu"
    dtype: str = "float32"
    beams: int = 3
    tokens: int = 64
    repeats: int = 3
    threads: int = 0
    code: str = ""


@dataclass
class Clocks:
    """The times of one process: for every clock the seconds of all its runs.

    `peak_memory` is in bytes and includes the first answer: of the process, or of the accelerator.
    """

    name: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int = 0
    image_tokens: int = 0
    tokens: list[list[int]] = field(default_factory=list)


TASKS = ["<OD>", "<CAPTION>", "<OCR>", "<DENSE_REGION_CAPTION>"]
CAPTION = 10
"""Tokens of a caption, the answer that GPUs are measured by."""
FEW = 8
"""Length of the short answer. The long answer minus the short one gives the time of the steps in between."""


class Engine(Protocol):
    """The stages that the clocks time. Tensors are of the engine's own types."""

    name: str

    def end_to_end(self, jpeg: bytes, task: str, tokens: int) -> list[int]:
        """Turn a file's bytes into a parsed answer; return its ids."""
        ...

    def batch(self, jpegs: Sequence[bytes], task: str, tokens: int) -> list[list[int]]:
        """Answer one task on many files at once."""
        ...

    def tasks(self, jpeg: bytes, tasks: Sequence[str], tokens: int) -> list[list[int]]:
        """Answer several tasks on one file, in the fastest way the engine offers."""
        ...

    def pixels(self, jpeg: bytes) -> Any:
        """Turn a file's bytes into a pixel tensor."""
        ...

    def vision(self, pixels: Any) -> Any:
        """Turn a pixel tensor into projected image tokens."""
        ...

    def encode(self, features: Any, task: str) -> Any:
        """Turn image tokens and a prompt into memory."""
        ...

    def decode(self, memory: Any, tokens: int) -> list[int]:
        """Generate ids from memory."""
        ...


def run_clocks(engine: Engine, spec: Spec) -> Clocks:
    """Run every clock `repeats` times after a warm-up run; run those of many answers once, at the end."""
    import torch

    clocks = Clocks(engine.name)
    jpegs = [Path(name).read_bytes() for name in spec.jpegs]
    task, jpeg, tokens = TASKS[0], jpegs[0], spec.tokens

    def measure(name: str, work: Callable[[], Any]) -> Any:
        result = work()
        for _ in range(spec.repeats):
            synchronise(spec.device)
            start = time.perf_counter()
            work()
            synchronise(spec.device)
            clocks.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def measure_once(name: str, work: Callable[[], Any], per: int = 1) -> Any:
        synchronise(spec.device)
        start = time.perf_counter()
        result = work()
        synchronise(spec.device)
        clocks.seconds[name] = [(time.perf_counter() - start) / per]
        return result

    with torch.inference_mode():
        measure_once("first answer", lambda: engine.end_to_end(jpeg, task, tokens))
        clocks.tokens.append(measure("JPEG to answer", lambda: engine.end_to_end(jpeg, task, tokens)))
        clocks.peak_memory = peak_memory(spec.device)
        pixels = measure("JPEG to pixels", lambda: engine.pixels(jpeg))
        features = measure("vision", lambda: engine.vision(pixels))
        memory = measure("encoder", lambda: engine.encode(features, task))
        measure(
            f"pixels to {CAPTION} tokens",
            lambda: engine.decode(engine.encode(engine.vision(pixels), task), CAPTION),
        )
        measure("first step", lambda: engine.decode(memory, 1))
        measure("short answer", lambda: engine.decode(memory, FEW))
        clocks.tokens.append(measure("long answer", lambda: engine.decode(memory, tokens)))
        steady = zip(clocks.seconds.pop("long answer"), clocks.seconds.pop("short answer"), strict=True)
        clocks.seconds["decode step"] = [(long - short) / (tokens - FEW) for long, short in steady]
        clocks.tokens += measure_once("four tasks, one image", lambda: engine.tasks(jpeg, TASKS, tokens))
        if len(jpegs) > 1:
            name = f"batch of {len(jpegs)}, per image"
            clocks.tokens += measure_once(name, lambda: engine.batch(jpegs, task, tokens), per=len(jpegs))
    clocks.image_tokens = features.shape[1]
    return clocks


class Ours:
    """This project through its public API."""

    def __init__(self, spec: Spec):
        import florence2

        self.name = f"florence2 {florence2.__version__}"
        self.f = florence2.load(spec.folder, device=spec.device, dtype=spec.dtype)
        self.options = self.f.options(num_beams=spec.beams, no_repeat_ngram_size=3)

    def _exactly(self, tokens: int) -> Any:
        return self.options.changed(max_new_tokens=tokens, min_new_tokens=tokens - 1)

    def end_to_end(self, jpeg: bytes, task: str, tokens: int) -> list[int]:
        return list(self.f.run(task, jpeg, options=self._exactly(tokens)).token_ids)

    def batch(self, jpegs: Sequence[bytes], task: str, tokens: int) -> list[list[int]]:
        requests = [(task, jpeg) for jpeg in jpegs]
        answers = self.f.run_batch(requests, options=self._exactly(tokens), batch_size=len(jpegs))
        return [list(answer.token_ids) for answer in answers]

    def tasks(self, jpeg: bytes, tasks: Sequence[str], tokens: int) -> list[list[int]]:
        image = self.f.encode_image(jpeg)
        answers = self.f.run_batch([(task, image) for task in tasks], options=self._exactly(tokens))
        return [list(answer.token_ids) for answer in answers]

    def pixels(self, jpeg: bytes) -> Any:
        return self.f.processor.image(jpeg)

    def vision(self, pixels: Any) -> Any:
        return self.f.model.encode_image(pixels)

    def encode(self, features: Any, task: str) -> Any:
        import torch

        ids = torch.tensor([self.f.processor.prompt(task)] * len(features), device=self.f.model.device)
        return self.f.model.encode(features, ids)

    def decode(self, memory: Any, tokens: int) -> list[int]:
        import florence2

        ids: list[int] = florence2.generate(self.f.model, memory, self._exactly(tokens)).sequences[0].tolist()
        return ids


class _Transformers:
    """The code that both references share."""

    name: str
    model: Any
    processor: Any
    dtype: Any
    device: str

    def __init__(self, spec: Spec):
        self.spec = spec

    def _settings(self, tokens: int) -> dict[str, Any]:
        return {
            "num_beams": self.spec.beams,
            "no_repeat_ngram_size": 3,
            "early_stopping": True,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
            "max_new_tokens": tokens,
            "min_new_tokens": tokens - 1,
            "do_sample": False,
        }

    def _open(self, jpeg: bytes) -> Any:
        from PIL import Image

        return Image.open(io.BytesIO(jpeg)).convert("RGB")

    def _inputs(self, jpegs: Sequence[bytes], tasks: Sequence[str]) -> Any:
        images = [self._open(jpeg) for jpeg in jpegs]
        inputs = self.processor(text=list(tasks), images=images, return_tensors="pt", padding=True)
        return {
            k: v.to(self.device, self.dtype) if v.is_floating_point() else v.to(self.device) for k, v in inputs.items()
        }

    def _generate(self, jpegs: Sequence[bytes], tasks: Sequence[str], tokens: int) -> Any:
        inputs = self._inputs(jpegs, tasks)
        ids = self.model.generate(**inputs, **self._settings(tokens))
        for text, task in zip(self.processor.batch_decode(ids, skip_special_tokens=False), tasks, strict=True):
            self.processor.post_process_generation(text=text, task=task, image_size=(600, 400))
        return ids

    def end_to_end(self, jpeg: bytes, task: str, tokens: int) -> list[int]:
        ids: list[int] = self._generate([jpeg], [task], tokens)[0].tolist()
        return ids

    def batch(self, jpegs: Sequence[bytes], task: str, tokens: int) -> list[list[int]]:
        ids: list[list[int]] = self._generate(jpegs, [task] * len(jpegs), tokens).tolist()
        return ids

    def tasks(self, jpeg: bytes, tasks: Sequence[str], tokens: int) -> list[list[int]]:
        return [self.end_to_end(jpeg, task, tokens) for task in tasks]  # neither can keep an encoded image

    def pixels(self, jpeg: bytes) -> Any:
        return self._inputs([jpeg], [TASKS[0]])["pixel_values"]


class NativeEngine(_Transformers):
    """The model in transformers, with torch's fused attention."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        import torch
        import transformers
        from transformers import AutoProcessor, Florence2ForConditionalGeneration

        self.name, self.device = f"transformers {transformers.__version__}", spec.device
        self.dtype = getattr(torch, spec.dtype)
        self.model = Florence2ForConditionalGeneration.from_pretrained(
            spec.folder, dtype=self.dtype, attn_implementation="sdpa"
        )
        self.model = self.model.to(spec.device).eval()
        self.processor = AutoProcessor.from_pretrained(spec.folder)  # type: ignore[no-untyped-call]
        # the published processor_config.json says this for the tasks measured here
        self.processor.post_processor.parse_task_config = {"description_with_bboxes": {}, "pure_text": {}}

    def vision(self, pixels: Any) -> Any:
        inner = self.model.model
        return inner.multi_modal_projector(inner.vision_tower(pixels).last_hidden_state)

    def encode(self, features: Any, task: str) -> Any:
        import torch

        sentence = self.processor._construct_prompts([task])[0]
        ids = torch.tensor([self.processor.tokenizer(sentence)["input_ids"]] * len(features), device=self.device)
        embeddings = torch.cat([features, self.model.get_input_embeddings()(ids)], dim=1)
        self.mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
        return self.model.model.language_model.encoder(inputs_embeds=embeddings, attention_mask=self.mask)

    def decode(self, memory: Any, tokens: int) -> list[int]:
        from transformers.modeling_outputs import BaseModelOutput

        # a fresh object each time: generate repeats its content for the beams in place
        fresh = BaseModelOutput(last_hidden_state=memory.last_hidden_state)
        ids = self.model.generate(encoder_outputs=fresh, attention_mask=self.mask, **self._settings(tokens))
        first: list[int] = ids[0].tolist()
        return first


class RemoteEngine(_Transformers):
    """Microsoft's remote code."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        import torch

        from parity.references import Remote

        self.dtype, self.device = getattr(torch, spec.dtype), spec.device
        self.reference = Remote(Path(spec.folder), Path(spec.code), self.dtype)
        self.name, self.processor = self.reference.name, self.reference.processor
        self.model = self.reference.model.to(spec.device)

    def _inputs(self, jpegs: Sequence[bytes], tasks: Sequence[str]) -> Any:
        inputs = super()._inputs(jpegs, tasks)
        inputs.pop("attention_mask")  # its generate makes its own mask, over image and prompt
        return inputs

    def vision(self, pixels: Any) -> Any:
        return self.model._encode_image(pixels)

    def encode(self, features: Any, task: str) -> Any:
        import torch

        ids = torch.tensor([self.processor.tokenizer(self.processor._construct_prompts([task])[0])["input_ids"]])
        embeddings = torch.cat([features, self.model.get_input_embeddings()(ids.to(self.device))], dim=1)
        self.mask = torch.ones(embeddings.shape[:2], device=self.device)
        return self.model.get_encoder()(inputs_embeds=embeddings, attention_mask=self.mask)

    def decode(self, memory: Any, tokens: int) -> list[int]:
        from transformers.modeling_outputs import BaseModelOutput

        fresh = BaseModelOutput(last_hidden_state=memory.last_hidden_state)
        settings = self._settings(tokens)
        ids = self.model.language_model.generate(encoder_outputs=fresh, attention_mask=self.mask, **settings)
        first: list[int] = ids[0].tolist()
        return first


ENGINES: dict[str, Callable[[Spec], Engine]] = {"ours": Ours, "native": NativeEngine, "remote": RemoteEngine}
_PACKAGES = {
    "ours": "florence2",
    "native": "transformers.models.florence2.modeling_florence2",
    "remote": "transformers",
}


def synchronise(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes of this process, or of its accelerator."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the peak of the parent process
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the engine that the first argument describes and print its times."""
    import importlib

    spec = Spec(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    import torch

    torch_seconds = time.perf_counter() - start
    if spec.threads:
        torch.set_num_threads(spec.threads)
    package = importlib.import_module(_PACKAGES[spec.engine])
    getattr(package, "load", None)  # florence2 imports its names on first use
    import_seconds = time.perf_counter() - start
    start = time.perf_counter()
    engine = ENGINES[spec.engine](spec)
    load_seconds = time.perf_counter() - start
    clocks = run_clocks(engine, spec)
    clocks.seconds |= {"import beyond torch": [import_seconds - torch_seconds], "load": [load_seconds]}
    print(json.dumps(asdict(clocks)))


if __name__ == "__main__":
    main()
