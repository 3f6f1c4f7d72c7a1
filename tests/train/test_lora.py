"""LoRA through peft: what learns, what is saved, and that merging changes no answer."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from florence2.checkpoints.adapters import merge_adapter
from florence2.errors import ConfigError
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train.data import Batch, make_batch
from florence2.train.freeze import count_trainable, set_training
from florence2.train.lora import LoraSettings, add_lora, find_targets, save_adapter
from florence2.train.loss import LossModule
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train
from recipes.nano.train import SceneSamples

EVERYWHERE = LoraSettings(rank=4, alpha=6, parts=("vision", "projection", "language"))
LANGUAGE = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.fixture
def batch(processor: Processor) -> Batch:
    return make_batch(few(), processor, 60)


def few() -> list[Sample]:
    """Two images with two questions each."""
    return [replace(sample, pairs=sample.pairs[:2]) for sample in map(SceneSamples(1, 2).__getitem__, range(2))]


def logits(model: Florence2Model, batch: Batch) -> Tensor:
    """Of the labels, each after those before it."""
    model.eval()
    with torch.no_grad():
        features = model.encode_image(batch.pixel_values)[batch.image_index]
        memory = model.encode(features, batch.input_ids, batch.attention_mask)
        mask = model.memory_mask(features, batch.attention_mask)
        return model.decode(batch.labels.clamp(min=1), memory, mask)


def learn(model: Florence2Model, batch: Batch, steps: int = 3) -> None:
    """A few updates as the trainer makes them, large enough to show."""
    set_training(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.02)
    for _ in range(steps):
        loss = LossModule(model)(batch) / batch.num_labels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def words(paths: list[str]) -> set[str]:
    return {path.split(".")[-1] for path in paths}


def test_targets_are_every_linear_map_of_the_parts_unless_named(mini: Florence2Model) -> None:
    found = find_targets(mini, LoraSettings())
    assert words(found) == LANGUAGE and all(path.startswith("language_model.") for path in found)
    assert len(found) == 6 + 10  # an encoder layer, and a decoder layer with two attentions
    found = find_targets(mini, LoraSettings(parts=("vision",)))
    assert words(found) == {"qkv", "proj", "fc1", "fc2"} and len(found) == 2 * 2 * 4
    found = find_targets(mini, LoraSettings(parts=("decoder", "vision"), targets=("fc1", "conv")))
    assert sorted(found) == sorted(
        ["language_model.decoder.layers.0.fc1", "vision_tower.convs.0.conv", "vision_tower.convs.1.conv"]
        + [f"vision_tower.blocks.{stage}.0.{kind}_block.ffn.fc1" for stage in (0, 1) for kind in ("spatial", "channel")]
    )


def test_only_the_matrices_learn(mini: Florence2Model, batch: Batch) -> None:
    targets = find_targets(mini, EVERYWHERE)
    expected = sum(4 * sum(mini.get_submodule(path).weight.shape) for path in targets)
    before = {name: value.clone() for name, value in mini.state_dict().items()}
    add_lora(mini, EVERYWHERE)
    learning = {name: p for name, p in mini.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert sum(p.numel() for p in learning.values()) == expected
    counts = count_trainable(mini)
    assert sum(trainable for trainable, _ in counts.values()) == expected and counts["embeddings"][0] == 0
    learn(mini, batch)
    after = {name.replace(".base_layer", ""): value for name, value in mini.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.any() for name, value in mini.state_dict().items() if "lora_B" in name)


def test_nothing_changes_before_something_is_learnt_and_the_seed_decides(mini: Florence2Model, batch: Batch) -> None:
    before, twin, other = logits(mini, batch), copy.deepcopy(mini), copy.deepcopy(mini)
    random_state = torch.get_rng_state()
    add_lora(mini, EVERYWHERE, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.rand(3)
    add_lora(twin, EVERYWHERE, seed=1)
    add_lora(other, EVERYWHERE, seed=2)
    same = [torch.equal(a, b) for a, b in zip(mini.parameters(), twin.parameters(), strict=True)]
    assert all(same) and not all(map(torch.equal, mini.parameters(), other.parameters()))
    torch.testing.assert_close(logits(mini, batch), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        EVERYWHERE,
        replace(EVERYWHERE, rslora=True, dropout=0.3),
        LoraSettings(rank=2, parts=("vision", "decoder"), targets=("conv", "fc2", "qkv", "k_proj")),
    ],
)
def test_merged_equals_unmerged_and_both_peft(
    settings: LoraSettings, mini: Florence2Model, batch: Batch, tmp_path: Path
) -> None:
    merged, taken_up, without = (copy.deepcopy(mini) for _ in range(3))
    add_lora(mini, settings)
    learn(mini, batch)
    expected = logits(mini, batch)
    save_adapter(mini, tmp_path / "adapter")
    merge_adapter(merged, tmp_path / "adapter")
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-5)
    import peft

    theirs = peft.PeftModel.from_pretrained(taken_up, tmp_path / "adapter")
    assert torch.equal(logits(taken_up, batch), expected)
    peft_merged = theirs.merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(peft_merged.state_dict()[name], value, atol=1e-6, rtol=1e-6)
    assert (logits(without, batch) - expected).abs().max() > 0.01  # there was something to learn


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("native", ("model.language_model.decoder.layers.0.fc1", "model.vision_tower.convs.0.conv")),
        ("microsoft", ("language_model.model.decoder.layers.0.fc1", "vision_tower.convs.0.proj")),
    ],
)
def test_names_of_the_references(layout: Layout, names: tuple[str, ...], mini: Florence2Model, tmp_path: Path) -> None:
    """Keys and targets have them; what is merged is the same."""
    by_ours, by_theirs = (copy.deepcopy(mini) for _ in range(2))
    add_lora(
        mini, LoraSettings(parts=("language", "vision"), targets=("fc1", "fc2", "k_proj", "v_proj", "qkv", "conv"))
    )
    with torch.no_grad():
        for name, parameter in mini.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    save_adapter(mini, tmp_path / "ours")
    save_adapter(mini, tmp_path / "theirs", layout)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    keys = set(load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in keys} == set(config["target_modules"])
    assert set(names) <= set(config["target_modules"]) and len(keys) == 2 * len(config["target_modules"]) > 40
    merge_adapter(by_ours, tmp_path / "ours")
    merge_adapter(by_theirs, tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(by_ours.parameters(), by_theirs.parameters(), strict=True))
    assert not torch.equal(by_ours.vision_tower.convs[0].conv.weight, mini.vision_tower.convs[0].conv.weight)


def test_a_module_that_the_reference_does_not_have(mini: Florence2Model, tmp_path: Path) -> None:
    """Microsoft's projection is a bare matrix."""
    add_lora(mini, LoraSettings(parts=("projection",)))
    with pytest.raises(ConfigError, match="microsoft layout has no module multi_modal_projector.image_projection"):
        save_adapter(mini, tmp_path, "microsoft")


def test_what_peft_saves_itself_is_merged_too(mini: Florence2Model, batch: Batch, tmp_path: Path) -> None:
    base = copy.deepcopy(mini)
    import peft

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "fc1", "image_projection"], rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 32}
    )
    theirs = peft.get_peft_model(mini, config)
    learn(mini, batch)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base, batch), logits(mini, batch), atol=1e-5, rtol=1e-5)


def test_the_trainer_trains_them(mini: Florence2Model, processor: Processor, tmp_path: Path) -> None:
    shared = mini.language_model.shared.weight.clone()
    add_lora(mini, replace(EVERYWHERE, dropout=0.1))
    settings = TrainSettings(steps=10, batch=2, learning_rate=5e-2, warmup=1, log_every=1, workers=0)
    train(mini, processor, few(), settings, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(mini.language_model.shared.weight, shared)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"targets": ("o_proj",)}, r"language has no module 'o_proj', but (q_proj|out_proj|k_proj|v_proj), "),
        ({"targets": ("fc1", "Conv2d"), "parts": ("vision",)}, "no module 'Conv2d', but conv"),
        ({"targets": ("conv1",), "parts": ("vision",)}, "no module 'conv1', but conv"),
        ({"targets": ("lm_head",)}, "no module 'lm_head', but fc1, fc2, k_proj"),
        ({"parts": ("embeddings",)}, "embeddings has no linear map"),
    ],
)
def test_targets_that_do_not_exist_are_refused(settings: dict, sentence: str, mini: Florence2Model) -> None:
    with pytest.raises(ConfigError, match=sentence):
        add_lora(mini, LoraSettings(**settings))
    assert all(parameter.requires_grad for parameter in mini.parameters())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0, "dropout": 1.0}, "alpha is 0; .* dropout is 1.0; it must be at least 0 and below 1"),
        ({"parts": ("visoin",)}, "parts are visoin; choose from vision"),
        ({"parts": ()}, "parts are empty"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoraSettings(**settings)


def test_the_order_of_calls_is_watched(mini: Florence2Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no LoRA matrices to save"):
        save_adapter(mini, tmp_path)
    add_lora(mini, LoraSettings())
    with pytest.raises(ConfigError, match="has LoRA matrices already"):
        add_lora(mini, LoraSettings())


def test_without_peft_there_is_one_sentence(mini: Florence2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'LoRA needs peft, which is not installed; .* pip install "\.\[lora\]"'):
        add_lora(mini, LoraSettings())
