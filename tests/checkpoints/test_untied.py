"""Models whose output projection or embedding of answers is not the token embedding: loaded, run, written, trained."""

import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import florence2
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.describe import describe_checkpoint
from florence2.cli.main import main
from florence2.errors import CheckpointError, Florence2Error
from florence2.fast.cuda.recorded.graphs import why_not_recorded
from florence2.model.config import Layout
from florence2.pipeline import Florence2
from tests.conftest import copy_checkpoint
from tests.release import keep

HEAD, SHARED = "language_model.lm_head.weight", "language_model.model.shared.weight"
NATIVE = "model.language_model.{}.weight"
Capture = pytest.CaptureFixture[str]


def noise(weight: Tensor, seed: int = 0) -> Tensor:
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + drawn.to(weight) * weight.float().std()


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = noise(tensors[HEAD])


def state_setting(folder: Path, value: bool, *sections: str) -> None:
    """Write tie_word_embeddings at the top of config.json and in its `sections`."""
    path = folder / "config.json"
    values: dict[str, Any] = json.loads(path.read_text())
    for section in (values, *(values[name] for name in sections)):
        section["tie_word_embeddings"] = value
    path.write_text(json.dumps(values))


@pytest.fixture
def untied_folder(small_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint in Microsoft's layout whose configuration does not say that its head differs."""
    copy_checkpoint(small_folder, tmp_path / "untied", other_head)
    return tmp_path / "untied"


@pytest.fixture
def untied(small: Florence2) -> Florence2:
    """A head and an embedding of answers of their own, and no bias, which the native layout cannot hold."""
    f = copy.deepcopy(small)
    f.model.final_logits_bias.zero_()
    f.model.untie_head(noise(f.model.output_weight.detach()))
    f.model.untie_answers(noise(f.model.language_model.shared.weight.detach(), 1))
    return f


@pytest.mark.parametrize("stated", keep([1], [None, False]))
def test_a_head_of_its_own_is_loaded_whatever_the_configuration_says(
    stated: bool | None, small_folder: Path, untied_folder: Path, picture: Image.Image
) -> None:
    """peft's merge_and_unload changes the weights and leaves the configuration."""
    if stated is not None:
        state_setting(untied_folder, stated, "text_config")
    f, stored = florence2.load(untied_folder), load_file(untied_folder / "model.safetensors")
    assert torch.equal(f.model.output_weight, stored[HEAD].float())
    assert torch.equal(f.model.language_model.shared.weight, stored[SHARED].float())
    assert f.model.config.text.untied_head and not f.model.config.text.untied_answers
    plain = florence2.load(untied_folder, attention="eager")
    fast, slow, tied = (g.run("<OD>", picture, max_new_tokens=8) for g in (f, plain, florence2.load(small_folder)))
    assert fast.token_ids == slow.token_ids != tied.token_ids
    with torch.no_grad():
        assert why_not_recorded(f.model) is None
    assert florence2.load(untied_folder, parts="vision").encode_image(picture).features.shape[0] == 1
    encoder = florence2.load(untied_folder, parts="encoder")
    with pytest.raises(Florence2Error, match='loaded with parts="encoder"'):
        encoder.run("<OD>", picture)


def test_equal_values_stay_apart_where_the_configuration_says_so(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c")
    assert load_model(tmp_path / "c").lm_head is None
    for sections in ((), ("text_config",)):
        state_setting(tmp_path / "c", False, *sections)
        model = load_model(tmp_path / "c")
        assert model.lm_head is not None and torch.equal(model.lm_head.weight, model.language_model.shared.weight)
    encoder = load_model(tmp_path / "c", parts="encoder")
    with pytest.raises(Florence2Error, match="The output projection is missing"):
        _ = encoder.lm_head.weight


def test_a_head_that_is_stated_and_missing(small_folder: Path, tmp_path: Path) -> None:
    copy_checkpoint(small_folder, tmp_path / "c", lambda tensors: tensors.pop(HEAD))
    state_setting(tmp_path / "c", False)
    with pytest.raises(CheckpointError, match=r"missing: language_model\.lm_head\.weight \[51289, 64\]"):
        load_model(tmp_path / "c")


def test_a_model_can_be_untied_as_it_is_loaded_and_not_tied(small_folder: Path, untied_folder: Path) -> None:
    model = load_model(small_folder, changes={"text.untied_head": True})
    assert model.lm_head is not None and torch.equal(model.lm_head.weight, model.language_model.shared.weight)
    with pytest.raises(CheckpointError, match=r"text\.untied_head and text\.untied_answers cannot be false"):
        load_model(untied_folder, changes={"text.untied_head": False})


@pytest.mark.parametrize("layout", keep(["native"], ["microsoft", "native"]))
def test_there_and_back_to_the_bit(layout: Layout, untied: Florence2, tmp_path: Path, picture: Image.Image) -> None:
    if layout == "microsoft":
        with pytest.raises(CheckpointError, match='The answers of this model have .* save it with the layout "native"'):
            untied.save(tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
        untied.model.language_model.decoder.embed_tokens = None
        untied.model.config = replace(untied.model.config, text=replace(untied.model.config.text, untied_answers=False))
    untied.save(tmp_path / layout, layout)
    again = florence2.load(tmp_path / layout)
    assert again.model.state_dict().keys() == untied.model.state_dict().keys()
    for name, value in untied.model.state_dict().items():
        stored = again.model.state_dict()[name]
        rows = stored[:, :51289] if name == "final_logits_bias" else stored[: len(value)]
        assert torch.equal(rows, value), name
    options = {"num_beams": 2, "max_new_tokens": 8}
    assert again.run("<CAPTION>", picture, **options).token_ids == untied.run("<CAPTION>", picture, **options).token_ids
    again.save(tmp_path / "twice", layout)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in (layout, "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.release
def test_transformers_reads_what_is_written(untied: Florence2, tmp_path: Path, picture: Image.Image) -> None:
    """Its native model, with the same weights, gives the same logits after the same tokens."""
    transformers = importlib.import_module("transformers")
    untied.save(tmp_path / "native", "native")
    f = florence2.load(tmp_path / "native")
    theirs = transformers.Florence2ForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    pixels, prompt = f.processor.image(picture), torch.tensor([f.processor.prompt("<CAPTION>")])
    answer = torch.tensor([f.run("<CAPTION>", picture, num_beams=1, max_new_tokens=8).token_ids[:-1]])
    with torch.no_grad():
        tokens = theirs.model.multi_modal_projector(theirs.model.vision_tower(pixels).last_hidden_state)
        joined = torch.cat([tokens, theirs.get_input_embeddings()(prompt)], dim=1)
        mask = torch.ones(joined.shape[:2], dtype=torch.long)
        bart = theirs.model.language_model
        hidden = bart(inputs_embeds=joined, attention_mask=mask, decoder_input_ids=answer).last_hidden_state
        expected, given = theirs.lm_head(hidden), f.model(pixels, prompt, answer)
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(given.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("name", "ignored"), [("decoder.embed_tokens", False), ("encoder.embed_tokens", True), ("shared", True)]
)
def test_native_embeddings_that_differ(name: str, ignored: bool, native_folder: Path, tmp_path: Path) -> None:
    """The native model looks prompts up in `shared` and answers in the decoder's; nothing reads the encoder's."""

    def differ(tensors: dict[str, Tensor]) -> None:
        tensors[NATIVE.format(name)] = noise(tensors[NATIVE.format("shared")])

    copy_checkpoint(native_folder, tmp_path / "c", differ)
    model = load_model(tmp_path / "c")
    assert model.config.text.untied_answers is not ignored and model.lm_head is None
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert torch.equal(model.language_model.shared.weight, stored[NATIVE.format("shared")].float())
    ids = torch.tensor([[5, 7]])
    read = "shared" if ignored else name
    assert torch.equal(model.language_model.embed_answer(ids), stored[NATIVE.format(read)].float()[ids])


def test_copies_without_the_embedding_that_differ_are_refused(native_folder: Path, tmp_path: Path) -> None:
    """Which of them embeds the prompts, nobody can say."""

    def differ(tensors: dict[str, Tensor]) -> None:
        shared = tensors.pop(NATIVE.format("shared"))
        tensors |= {"lm_head.weight": shared, NATIVE.format("decoder.embed_tokens"): noise(shared)}

    copy_checkpoint(native_folder, tmp_path / "c", differ)
    with pytest.raises(CheckpointError, match="stored under several names, but .* has other values"):
        load_model(tmp_path / "c")


def test_info_counts_the_head(small_folder: Path, untied_folder: Path, capsys: Capture) -> None:
    tied, own = (describe_checkpoint(folder) for folder in (small_folder, untied_folder))
    assert tied["untied"] == [] and own["untied"] == ["lm_head.weight"]
    assert own["parameters"]["lm_head"] == own["parameters"]["language_model.shared"] == 51289 * 64
    assert own["parameters"]["total"] - tied["parameters"]["total"] == 51289 * 64
    assert main(["info", str(untied_folder)]) == 0
    assert "lm_head: 3,282,496" in capsys.readouterr().out


@pytest.mark.release
def test_a_longer_vocabulary_keeps_every_use(untied: Florence2, tmp_path: Path) -> None:
    longer = florence2.extend_vocabulary(untied, ["<near>", "<far>"])
    longer.save(tmp_path / "longer", "native")
    again = florence2.load(tmp_path / "longer").model
    for path in ("language_model.shared", "language_model.decoder.embed_tokens", "lm_head"):
        weight = longer.model.get_submodule(path).weight
        assert len(weight) == 51291 and torch.equal(again.get_submodule(path).weight[:51291], weight), path


@pytest.mark.parametrize("change", [lambda m: m.untie_head(), lambda m: m.untie_answers()], ids=["head", "answers"])
def test_the_copy_learns_apart(change: Callable[[Any], None], small_folder: Path) -> None:
    model = load_model(small_folder)
    before = model(torch.zeros(1, 3, 160, 224), torch.tensor([[0, 5, 2]]), torch.tensor([[2, 7]]))
    change(model)
    after = model(torch.zeros(1, 3, 160, 224), torch.tensor([[0, 5, 2]]), torch.tensor([[2, 7]]))
    assert torch.equal(before, after)
    after.sum().backward()
    own = model.lm_head if model.lm_head is not None else model.language_model.decoder.embed_tokens
    assert own is not None and own.weight.grad is not None and own.weight.grad.abs().sum() > 0
