"""Adapters that peft makes of transformers' native model: merged, they give the logits that peft gives."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import florence2
from florence2.errors import CheckpointError, ConfigError
from florence2.model.config import Layout
from tests.conftest import copy_native
from tests.release import keep

pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other

PROMPT, ANSWER = torch.tensor([[0, 100, 200, 2]]), torch.tensor([[2, 0, 300, 1500, 17]])
KINDS: dict[str, tuple[dict[str, Any], tuple[bool, bool]]] = {
    "DoRA": ({"target_modules": ["q_proj", "fc1"], "use_dora": True}, (False, False)),
    "DoRA of convolutions and a table": (
        {"target_modules": r".*(qkv|convs\.\d\.conv|row_embeddings)", "use_dora": True},
        (False, False),
    ),
    "DoRA, rsLoRA and ranks": (
        {"target_modules": ["q_proj", "fc1"], "use_dora": True, "use_rslora": True, "rank_pattern": {"fc1": 2}},
        (False, False),
    ),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, (True, False)),
    "DoRA of the head": ({"target_modules": ["lm_head"], "use_dora": True}, (True, False)),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, (True, False)),
    "whole embeddings": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, (True, True)),
    "whole embedding of prompts": ({"target_modules": ["q_proj"], "modules_to_save": ["shared"]}, (True, True)),
    "whole norms": (
        {"target_modules": ["q_proj"], "modules_to_save": ["image_proj_norm", "layernorm_embedding"]},
        (False, False),
    ),
    "embeddings": ({"target_modules": ["embed_tokens"]}, (False, True)),
    "embedding of prompts": ({"target_modules": ["shared", "q_proj"]}, (True, True)),
    "biases": ({"target_modules": ["q_proj", "fc2"], "bias": "all"}, (False, False)),
}
"""Settings of peft, and which uses of the token embedding are untied by the adapter: head and answers."""


def expected_logits(model: Any, pixels: Tensor) -> Tensor:
    """The logits of transformers' model, with the prompt's ids looked up as it does."""
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state)
        joined = torch.cat([tokens, model.get_input_embeddings()(PROMPT)], dim=1)
        mask = torch.ones(joined.shape[:2], dtype=torch.long)
        bart = model.model.language_model(inputs_embeds=joined, attention_mask=mask, decoder_input_ids=ANSWER)
        logits: Tensor = model.lm_head(bart.last_hidden_state)
        return logits


def adapt(base: Path, **settings: Any) -> Any:
    """The native model with an adapter. Its packages take seconds to import: not while tests are collected."""
    peft, transformers = importlib.import_module("peft"), importlib.import_module("transformers")
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(base).eval()
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **settings)).eval()


def make_adapter(base: Path, folder: Path, pixels: Tensor, **settings: Any) -> Tensor:
    """Write an adapter with random values; return the logits that peft gives with it."""
    adapted = adapt(base, **settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.abs().mean().clamp(min=0.1))
    logits = expected_logits(adapted.get_base_model(), pixels)
    adapted.save_pretrained(folder)
    return logits


@pytest.fixture(scope="module")
def base(mini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the native layout. Do not write to it."""
    return copy_native(mini_folder, tmp_path_factory.mktemp("peft"))


@pytest.fixture
def pixels(base: Path, picture: Image.Image) -> Tensor:
    return florence2.load(base).processor.image(picture)


@pytest.mark.parametrize("kind", keep(range(0, len(KINDS), 2), KINDS))
def test_the_logits_are_those_of_peft(kind: str, base: Path, tmp_path: Path, pixels: Tensor) -> None:
    settings, untied = KINDS[kind]
    expected = make_adapter(base, tmp_path / "adapter", pixels, **settings)
    f = florence2.load(base, adapter=tmp_path / "adapter")
    with torch.no_grad():
        logits = f.model(pixels, PROMPT, ANSWER)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (f.model.config.text.untied_head, f.model.config.text.untied_answers) == untied
    layouts: tuple[Layout, ...] = ("native",) if untied[1] else ("native", "microsoft")
    for layout in layouts:
        f.save(tmp_path / layout, layout)
        again = florence2.load(tmp_path / layout).model.state_dict()
        assert again.keys() == f.model.state_dict().keys()
        for name, value in f.model.state_dict().items():
            if name != "final_logits_bias":  # Microsoft's layout leaves out the rows after the last token
                assert torch.equal(again[name], value[: len(again[name])]), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices is"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying is true for"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    settings: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    adapt(base, target_modules=["q_proj"], **settings).save_pretrained(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        florence2.load(base, adapter=tmp_path)


def test_dora_needs_its_lengths(base: Path, tmp_path: Path, pixels: Tensor) -> None:
    make_adapter(base, tmp_path, pixels, target_modules=["q_proj"])
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="has only some of its two matrices and lengths"):
        florence2.load(base, adapter=tmp_path)


def test_a_module_that_was_trained_whole_must_be_in_the_file(base: Path, tmp_path: Path, pixels: Tensor) -> None:
    make_adapter(base, tmp_path, pixels, target_modules=["q_proj"])
    config = tmp_path / "adapter_config.json"
    for saved, fits in (("lm_head", False), ("classifier", True)):  # this model has no classifier
        values = json.loads(config.read_text()) | {"modules_to_save": [saved]}
        config.write_text(json.dumps(values))
        if fits:
            florence2.load(base, adapter=tmp_path)
            continue
        with pytest.raises(CheckpointError, match="modules_to_save names lm_head, but the file holds no tensor of it"):
            florence2.load(base, adapter=tmp_path)
