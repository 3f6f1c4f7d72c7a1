"""The settings next to the graphs: what this package reads again, and what transformers.js looks for."""

import json
from dataclasses import replace
from pathlib import Path

import florence2
from florence2 import Florence2
from florence2.checkpoints.checks.calibration import read_calibration
from florence2.checkpoints.config_files import read_config, read_image_config
from florence2.checkpoints.files import read_tasks
from florence2.export.sidecars import settings_files, write_sidecars
from florence2.inputs.tasks import token_task
from florence2.inputs.tokenizer import FlorenceTokenizer


def test_they_bring_back_the_model_they_came_from(nano: Florence2, exported: Path) -> None:
    assert read_config(exported) == nano.model.config
    assert replace(read_image_config(exported), image_seq_length=None) == replace(
        nano.processor.image_config, image_seq_length=None
    )
    assert read_calibration(exported / "confidence.json") == nano.processor.calibration
    tokenizer = FlorenceTokenizer(exported / "tokenizer.json")
    text = "Locate <loc_5><loc_999> naïve"
    assert tokenizer.encode(text) == nano.processor.tokenizer.encode(text)


def test_both_layouts_of_settings_come_back(native_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    for folder in (native_folder, small_folder):
        f = florence2.load(folder, attention="eager")
        target = tmp_path / folder.name
        target.mkdir()
        write_sidecars(target, f.model.config, f.processor)
        assert read_config(target) == f.model.config
        generation = json.loads((target / "generation_config.json").read_text())
        assert generation.items() >= {**f.model.config.generation, "decoder_start_token_id": 2}.items()


def test_clients_find_what_they_look_for(nano: Florence2) -> None:
    files = settings_files(nano.model.config, nano.processor)
    config = files["config.json"]
    assert config["model_type"] == "florence2" and config["is_encoder_decoder"]
    assert config["text_config"]["model_type"] == "florence2_language"
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    images = files["preprocessor_config.json"]
    assert (images["processor_class"], images["image_processor_type"]) == ("Florence2Processor", "CLIPImageProcessor")
    assert images["task_prompts_without_inputs"]["<OD>"] == "Locate the objects with category name in the image."
    assert images["task_prompts_with_input"]["<REGION_TO_OCR>"] == "What text is in the region {input}?"
    readings = images["tasks_answer_post_processing_type"]
    assert readings["<OCR_WITH_REGION>"] == "ocr" and readings["<REGION_PROPOSAL>"] == "bboxes"
    assert files["tokenizer_config.json"]["tokenizer_class"] == "BartTokenizer"
    assert "<loc_999>" in {
        token["content"]
        for token in json.loads(nano.processor.tokenizer.to_files("microsoft", 1024)["tokenizer.json"])["added_tokens"]
    }


def test_own_tasks_travel(nano: Florence2, tmp_path: Path) -> None:
    task = token_task("<VQA>", "text", "anything")
    processor = nano.processor.changed(tasks=nano.processor.tasks.declared([task]))
    write_sidecars(tmp_path, nano.model.config, processor)
    assert read_tasks(tmp_path) == (task,)
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert images["task_prompts_with_input"]["<VQA>"] == task.sentence
