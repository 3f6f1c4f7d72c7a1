"""The settings next to the graphs, as transformers.js and `florence2.lite` read them."""

import json
from pathlib import Path
from typing import Any

from florence2.checkpoints.checks.calibration import CALIBRATION_FILE, write_calibration
from florence2.checkpoints.config_files import config_to_files, image_config_to_json
from florence2.checkpoints.files import write_json, write_tasks, written_whole
from florence2.errors import CheckpointError
from florence2.inputs.tasks import AnswerKind, TaskTable
from florence2.inputs.tokenizer_file import BEGIN, END, MASK, PADDING, UNKNOWN
from florence2.lite import layout
from florence2.model.config import Florence2Config
from florence2.processor import Processor

_READINGS: dict[AnswerKind, str] = {
    "text": "pure_text",
    "boxes": "description_with_bboxes",
    "proposals": "bboxes",
    "phrases": "phrase_grounding",
    "quads": "ocr",
    "polygons": "polygons",
    "boxes_or_polygons": "description_with_bboxes_or_polygons",
}
"""The reference's names of the kinds of answers."""


def write_sidecars(folder: Path, config: Florence2Config, processor: Processor) -> None:
    """Write the settings of model, generation, images, tokenizer, tasks and confidences.

    Raises:
        CheckpointError: Answers have a token embedding of their own, for which the layout has no place.
        ConfigError: A setting would be lost.
    """
    for name, values in settings_files(config, processor).items():
        write_json(folder / name, values)
    tokenizer = processor.tokenizer.to_files(config.layout, config.text.max_position_embeddings)
    with written_whole(folder / layout.TOKENIZER) as draft:
        draft.write_text(tokenizer["tokenizer.json"], encoding="utf-8")
    write_tasks(folder, processor.tasks)
    if processor.calibration.tables:
        write_calibration(folder / CALIBRATION_FILE, processor.calibration)


def settings_files(config: Florence2Config, processor: Processor) -> dict[str, dict[str, Any]]:
    """Return the values of the JSON files by name. Raises as `write_sidecars`."""
    refuse_untied_answers(config)
    values, _ = config_to_files(config, config.layout, "float32")
    # clients find the names of the decoder's cache by this type
    values["text_config"]["model_type"] = "florence2_language"
    # transformers.js would otherwise ask for 8-bit files in a browser
    values["transformers.js_config"] = {"dtype": "fp32"}
    text = config.text
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "pad", "eos", "decoder_start")}
    image = image_config_to_json(processor.image_config, config.vision)
    return {
        layout.CONFIG: json.loads(json.dumps(values)),
        layout.GENERATION_CONFIG: {**config.generation, **ids},
        layout.PREPROCESSOR_CONFIG: {
            "processor_class": "Florence2Processor",
            **image,
            **_task_settings(processor.tasks),
        },
        layout.TOKENIZER_CONFIG: {
            "tokenizer_class": "BartTokenizer",
            "model_max_length": text.max_position_embeddings,
            **{"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING, "unk_token": UNKNOWN},
            **{"cls_token": BEGIN, "sep_token": END, "mask_token": MASK},
        },
    }


def refuse_untied_answers(config: Florence2Config) -> None:
    """Raise CheckpointError for a model whose answers have a token embedding of their own."""
    if config.text.untied_answers:
        raise CheckpointError(
            "The answers of this model have a token embedding of their own, and the ONNX layout has one for prompts "
            "and answers together; export a model that shares it."
        )


def _task_settings(tasks: TaskTable) -> dict[str, dict[str, str]]:
    """Return how clients make prompts and read answers."""
    return {
        "tasks_answer_post_processing_type": {token: _READINGS[task.answer] for token, task in tasks.items()},
        "task_prompts_without_inputs": {
            token: task.sentence for token, task in tasks.items() if task.takes == "nothing"
        },
        "task_prompts_with_input": {token: task.sentence for token, task in tasks.items() if task.takes != "nothing"},
    }
