"""A loop of one's own over the cached step, and results that autograd accepts."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import florence2
from florence2 import Florence2, Stepper
from florence2.errors import OptionError, PromptError


@pytest.fixture(scope="module")
def memory(small: Florence2) -> Tensor:
    return torch.randn(2, 9, small.model.config.text.d_model, generator=torch.Generator().manual_seed(1))


def uncached(small: Florence2, memory: Tensor, ids: list[list[int]]) -> Tensor:
    """The logits after sequences of the same length, K for each memory."""
    with torch.no_grad():
        return small.model.decode(torch.tensor(ids), memory.repeat_interleave(len(ids) // len(memory), 0))[:, -1]


def test_it_computes_what_decode_computes(small: Florence2, memory: Tensor) -> None:
    """Two beams for each of two inputs, reordered on the way, and one input left out."""
    stepper = florence2.stepper(small.model, memory, beams=2, max_length=6)
    sequences = [[2], [2], [2], [2]]
    for newest in ([5, 6, 7, 8], [9, 10, 11, 12]):
        logits = stepper.step(torch.tensor([ids[-1] for ids in sequences]))
        assert torch.allclose(logits, uncached(small, memory, sequences), atol=1e-4)
        stepper.reorder(torch.tensor([[1, 1], [1, 0]]))
        sequences = [[*sequences[b], id] for b, id in zip((1, 1, 3, 2), newest, strict=True)]
    stepper.keep(torch.tensor([1]))
    logits = stepper.step(torch.tensor([ids[-1] for ids in sequences[2:]]))
    assert torch.allclose(logits, uncached(small, memory[1:], sequences[2:]), atol=1e-4)
    assert (stepper.length, stepper.batch, stepper.beams, stepper.max_length) == (3, 1, 2, 6)


def test_a_padded_prompt(small: Florence2, memory: Tensor) -> None:
    mask = torch.tensor([[True] * 6 + [False] * 3] * 2)
    logits = florence2.stepper(small.model, memory, memory_mask=mask).step(torch.tensor([2, 2]))
    assert torch.allclose(logits, uncached(small, memory[:, :6], [[2], [2]]), atol=1e-4)


def test_its_tensors_are_ordinary(small: Florence2, memory: Tensor) -> None:
    logits = florence2.stepper(small.model, memory).step(torch.tensor([2, 2]))
    assert not logits.is_inference() and not logits.requires_grad
    scale = torch.ones((), requires_grad=True)
    (logits * scale).logsumexp(-1).sum().backward()
    assert scale.grad is not None


def test_it_ends(small: Florence2, memory: Tensor) -> None:
    stepper = florence2.stepper(small.model, memory, max_length=2)
    for _ in range(2):
        stepper.step(torch.tensor([2, 2]))
    with pytest.raises(PromptError, match="has read 2 ids, its limit; give a larger max_length"):
        stepper.step(torch.tensor([2, 2]))
    assert stepper.length == 2
    positions = small.model.config.text.max_position_embeddings
    assert florence2.stepper(small.model, memory).max_length == positions


def test_wrong_shapes_and_settings(small: Florence2, memory: Tensor) -> None:
    stepper = florence2.stepper(small.model, memory, beams=3)
    with pytest.raises(PromptError, match=r"ids has the shape \(2,\); a step reads one id of every sequence, \(6,\)"):
        stepper.step(torch.tensor([2, 2]))
    with pytest.raises(PromptError, match=r"parents has the shape \(6,\); it must be \(2, 3\)"):
        stepper.reorder(torch.arange(6))
    for changes, words in (({"beams": 0}, "beams is 0"), ({"max_length": 0}, "max_length is 0; it must be 1 to")):
        settings: dict[str, Any] = changes
        with pytest.raises(OptionError, match=words):
            florence2.stepper(small.model, memory, **settings)


def test_the_example_of_the_documentation(
    picture_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives the greedy answer of nano."""
    f = florence2.load("nano", device="cpu")
    text = inspect.getdoc(Stepper) or ""
    code = textwrap.dedent(text[text.index("    prompt = ") : text.index("It steps as")])
    monkeypatch.chdir(picture_file.parent)
    exec(code.replace("photo.jpg", picture_file.name), {"f": f, "torch": torch, "florence2": florence2})
    expected = f.run("<CAPTION>", picture_file, num_beams=1, max_new_tokens=50, forced_bos_token_id=None)
    assert capsys.readouterr().out.strip() == expected.text != ""


@pytest.mark.parametrize("changes", [{"num_beams": 1}, {"num_beams": 3}, {"sample": True, "seed": 0}], ids=str)
def test_generated_ids_are_labels(small: Florence2, images: list[Image.Image], changes: dict[str, Any]) -> None:
    """A loss on what was generated, in one line, with gradients."""
    pixels = small.processor.image(images[0])
    prompt = torch.tensor([small.processor.prompt("<OD>")])
    with torch.no_grad():
        memory = small.model.encode(small.model.encode_image(pixels), prompt)
    generation = florence2.generate(small.model, memory, small.options(max_new_tokens=5, **changes))
    assert not any(value.is_inference() for value in vars(generation).values() if isinstance(value, Tensor))
    loss = small.model.loss(pixels, prompt, generation.sequences[:, 1:])
    loss.backward()
    weight = small.model.language_model.shared.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    small.model.zero_grad()
