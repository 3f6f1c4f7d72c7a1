"""The proof at the end of an export: onnxruntime runs the written graphs, torch the model that they were made from.

Every graph is run at two image sizes, alone and in a padded batch. The reference of the decoder is `model.decode`,
which caches nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from florence2.errors import Florence2Error, clip
from florence2.lite.layout import (
    CROSS,
    EMBED,
    ENCODER,
    FIRST,
    MERGED,
    STEP,
    USE_CACHE,
    VISION,
    cache_names,
    graph_file,
)
from florence2.model.florence2 import Florence2Model

TOLERANCE = 5e-5  # of the largest value: far above the differences seen, far below those of a changed weight
_PROMPT, _ANSWER = 6, 4  # ids; few, because the uncached reference reads the whole answer
_CALLS = (2, 1, 1)  # ids that the decoder reads at a time
_SHARING = 2  # sequences of one memory, in the graph that allows it


class ProofError(Florence2Error):
    """An exported graph does not compute what the model does. Nothing was written."""


class GraphFile:
    """One graph in onnxruntime, on the CPU."""

    def __init__(self, folder: Path, name: str):
        self.name, options = name, onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        with self._errors():
            self._session = onnxruntime.InferenceSession(folder / graph_file(name), options, ["CPUExecutionProvider"])
        self.inputs = [each.name for each in self._session.get_inputs()]
        self.outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, **feeds: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name; values that are not inputs are left out."""
        given = {name: np.asarray(value) for name, value in feeds.items() if name in self.inputs}
        with self._errors():
            return dict(zip(self.outputs, self._session.run(None, given), strict=True))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of onnxruntime, which have no common class, into a ProofError."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            raise ProofError(
                f"onnxruntime cannot run the exported graph {self.name}: {clip(error)} Nothing was written."
            ) from None


class CachedDecoder:
    """The decoder's graphs over memories (B, S, D): `first` reads the first ids, `later` those after them.

    With `cross`, which computes their keys and values, `_SHARING` sequences share a memory, else it has one of its own.
    """

    def __init__(
        self, first: GraphFile, later: GraphFile, cross: GraphFile | None, model: Florence2Model, **source: Tensor
    ):
        self.first, self.later, self.started = first, later, False
        self.width = 1 if cross is None else _SHARING
        text, batch = model.config.text, len(source["encoder_hidden_states"])
        heads = text.decoder_attention_heads
        nothing = torch.zeros(batch * self.width, heads, 0, text.d_model // heads)
        names = [cache_names("past_key_values", each, text.decoder_layers) for each in ("decoder", "encoder")]
        self.feeds: dict[str, Tensor | np.ndarray] = {**source, **{name: nothing for each in names for name in each}}
        if cross is not None:
            self._keep(cross(**self.feeds))

    def __call__(self, embeddings: Tensor) -> np.ndarray:
        """Read embeddings of ids (B·width, T, D); return their logits (B·width, T, V)."""
        graph = self.later if self.started else self.first
        out = graph(**self.feeds, inputs_embeds=embeddings, **{USE_CACHE: np.array([self.started])})
        self.started = True
        self._keep(out)
        return out["logits"]

    def _keep(self, out: dict[str, np.ndarray]) -> None:
        """Take the grown cache; keys and values of the memory that were given are not returned."""
        present = {name: value for name, value in out.items() if name.startswith("present") and value.shape[2]}
        self.feeds |= {name.replace("present", "past_key_values"): value for name, value in present.items()}


@dataclass(frozen=True)
class Example:
    """Random inputs: pixel values (B, 3, H, W), ids of prompts (B, S) and their mask, ids of answers (2·B, T).

    Two answers in a row share a memory.
    """

    pixels: Tensor
    prompt: Tensor
    mask: Tensor
    answer: Tensor


def prove_graphs(folder: Path, model: Florence2Model, height: int, width: int, exact: bool = True) -> dict[str, float]:
    """Compare every graph in `folder` with the model.

    Args:
        folder: The folder of the export.
        model: The model whose weights the graphs hold, in float32.
        height: The height of the checkpoint's images; the second size is derived from it.
        width: Their width.
        exact: Whether the vision graph must agree too; that of 8 bits is only measured.

    Returns:
        The largest difference of each graph, as a part of the largest value of its output.

    Raises:
        ProofError: A difference is larger than `TOLERANCE`.
    """
    differences: dict[str, float] = {}
    with torch.inference_mode():
        for example in examples(model, height, width):
            for graph, found in _compare(folder, model, example):
                if not found <= TOLERANCE and (exact or graph != VISION):  # so is NaN
                    raise ProofError(
                        f"The exported graph {graph} differs from the model by {found:.1e} of its largest value, more "
                        f"than {TOLERANCE:.0e}, for pixel values of the shape {tuple(example.pixels.shape)}. Nothing "
                        "was written."
                    )
                differences[graph] = max(found, differences.get(graph, 0.0))
    return differences


def examples(model: Florence2Model, height: int, width: int) -> Iterator[Example]:
    """Yield an example of the checkpoint's image size, and a padded batch of another size."""
    vocabulary, generator = model.config.text.vocab_size, torch.Generator().manual_seed(0)
    for batch, size in ((1, (height, width)), (2, other_size(model, height, width))):
        mask = torch.ones(batch, _PROMPT, dtype=torch.long)
        mask[1:, -2:] = 0
        prompt, answer = (
            torch.randint(0, vocabulary, shape, generator=generator)
            for shape in ((batch, _PROMPT), (batch * _SHARING, _ANSWER))
        )
        yield Example(torch.randn(batch, 3, *size, generator=generator), prompt, mask, answer)


def other_size(model: Florence2Model, height: int, width: int) -> tuple[int, int]:
    """Return a smaller and odd size, as far as the model allows; few attention windows divide its grid."""
    for share in (0.55, 0.75, 0.95):
        size = int(height * share) - 1, int(width * share * 0.9)
        if min(*size, *model.config.vision.grid_size(*size)) >= 2:
            return size
    return height, width


def _compare(folder: Path, model: Florence2Model, example: Example) -> Iterator[tuple[str, float]]:
    """Yield the name of each graph and its difference; few graphs are in memory at a time."""
    language = model.language_model
    image = model.encode_image(example.pixels)
    yield VISION, _difference(GraphFile(folder, VISION)(pixel_values=example.pixels)["image_features"], image)
    prompt, answer = language.shared(example.prompt), language.shared(example.answer)
    vocabulary = torch.arange(model.config.text.vocab_size)[None]
    yield (
        EMBED,
        _difference(GraphFile(folder, EMBED)(input_ids=vocabulary)["inputs_embeds"], language.shared(vocabulary)),
    )
    mask, both = model.memory_mask(image, example.mask), torch.cat([image, prompt], dim=1)
    memory = language.encoder(both, mask)
    encoded = GraphFile(folder, ENCODER)(attention_mask=mask.long(), inputs_embeds=both)
    yield ENCODER, _difference(encoded["last_hidden_state"], memory)
    each_memory, each_mask = (each.repeat_interleave(_SHARING, dim=0) for each in (memory, mask))
    logits = model.decode(example.answer, each_memory, each_mask)
    for name, decoder in _decoders(folder, model, encoder_attention_mask=mask.long(), encoder_hidden_states=memory):
        some = slice(None, None, _SHARING // decoder.width)  # all answers, or the first of each memory
        read = [decoder(part) for part in answer[some].split(_CALLS, dim=1)]
        yield name, _difference(np.concatenate(read, axis=1), logits[some])


def _decoders(folder: Path, model: Florence2Model, **source: Tensor) -> Iterator[tuple[str, CachedDecoder]]:
    """Yield the ways to decode that the folder has, by the graph that makes the difference."""
    merged = GraphFile(folder, MERGED)
    yield MERGED, CachedDecoder(merged, merged, None, model, **source)
    step = GraphFile(folder, STEP)
    yield CROSS, CachedDecoder(step, step, GraphFile(folder, CROSS), model, **source)
    if (folder / graph_file(FIRST)).is_file():
        yield FIRST, CachedDecoder(GraphFile(folder, FIRST), step, None, model, **source)


def _difference(values: np.ndarray, reference: Tensor) -> float:
    """Return the largest difference, as a part of the largest value or of 1, whichever is larger."""
    expected = reference.numpy()
    return float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max()))
