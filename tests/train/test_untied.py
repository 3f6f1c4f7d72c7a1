"""A model with an output projection of its own, trained and exported from the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import florence2
from florence2.cli.main import main
from florence2.train.freeze import count_trainable, freeze
from tests.conftest import copy_checkpoint
from tests.release import keep

HEAD, SHARED = "language_model.lm_head.weight", "language_model.model.shared.weight"


@pytest.fixture
def untied_folder(mini_folder: Path, tmp_path: Path) -> Path:
    copy_checkpoint(mini_folder, tmp_path / "untied", lambda tensors: tensors[HEAD].mul_(1.5))
    return tmp_path / "untied"


@pytest.mark.parametrize("frozen", keep([1], [[], ["--freeze", "embeddings"]]))
def test_the_head_trains_and_comes_back(frozen: list[str], untied_folder: Path, data: Path, tmp_path: Path) -> None:
    words = f"train {data} --model {untied_folder} --out {tmp_path / 'run'} --steps 2 --batch 2 --workers 0"
    settings = "--device cpu --learning-rate 1e-2 --warmup 0 --save-every 1".split()
    assert main([*words.split(), *settings, *frozen]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (untied_folder, tmp_path / "run" / "checkpoint"))
    assert torch.equal(before[HEAD], after[HEAD]) is torch.equal(before[SHARED], after[SHARED]) is bool(frozen)
    model = florence2.load(tmp_path / "run" / "checkpoint").model
    assert torch.equal(model.output_weight, after[HEAD].float()) and model.config.text.untied_head


def test_parts_of_an_untied_model_add_up(untied_folder: Path) -> None:
    model = florence2.load(untied_folder).model
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(count for _, count in count_trainable(model).values()) == total
    freeze(model, ["language"])
    assert {name for name, (trainable, _) in count_trainable(model).items() if trainable} == {"vision", "projection"}


@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_an_adapter_of_the_head_is_converted(layout: str, mini_folder: Path, data: Path, tmp_path: Path) -> None:
    rows, width = florence2.load(mini_folder).model.output_weight.shape
    name, generator = "base_model.model.language_model.lm_head", torch.Generator().manual_seed(0)
    a, b = torch.randn(2, width, generator=generator), torch.randn(rows, 2, generator=generator)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    words = ["convert", mini_folder, tmp_path / "whole", "--adapter", folder, "--layout", layout]
    assert main([str(word) for word in words]) == 0
    image = data / "000000.png"
    merged, whole = florence2.load(mini_folder, adapter=folder), florence2.load(tmp_path / "whole")
    assert torch.equal(whole.model.output_weight[:rows], merged.model.output_weight)
    models = (merged, whole, florence2.load(mini_folder))
    answers = [f.run("<OD>", image, num_beams=1, max_new_tokens=6).token_ids for f in models]
    assert answers[0] == answers[1] != answers[2]
