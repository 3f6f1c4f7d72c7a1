"""Reading images, building prompts and parsing answers need no torch: `import torch` fails in these processes."""

import subprocess
import sys
from pathlib import Path

import pytest

import florence2
from parity.recipe import GOLDEN

PACKAGE = Path(florence2.__file__).parent
MODULES = [
    *(f"florence2.{room}.{path.stem}" for room in ("inputs", "answers") for path in (PACKAGE / room).glob("[!_]*.py")),
    "florence2.inputs",
    "florence2.answers",
    "florence2.errors",
    "florence2.model.config",
    "florence2.checkpoints.files",
    "florence2.checkpoints.config_files",
]
BLOCK = """
import sys
sys.modules["torch"] = None
"""
USE = """
import sys
from pathlib import Path
import numpy as np
from florence2.answers.answer import image_reference, parse_answer
from florence2.checkpoints.config_files import read_config, read_image_config
from florence2.inputs.processor import InputProcessor
from florence2.inputs.tokenizer import FlorenceTokenizer

golden = Path(sys.argv[1])
processor = InputProcessor(FlorenceTokenizer(golden / "tokenizer.json"), read_image_config(golden / "tiny"))
image = np.zeros((50, 100, 3), np.uint8)
answer = parse_answer("<OD>", "boxes", "car<loc_1><loc_2><loc_500><loc_600>", (100, 50), image=image_reference(image))
print(processor.image_array(image).shape, processor.prompt("<REGION_TO_OCR>", (1, 2, 30, 40), (100, 50))[0])
print(answer.boxes[0].label, answer.draw(image).size, answer._repr_png_()[1:4], answer.to_florence()["<OD>"]["labels"])
print(type(read_config(golden / "tiny")).__name__)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_module_can_be_imported() -> None:
    done = python("import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)", *MODULES)
    assert done.returncode == 0, done.stderr


def test_images_prompts_and_answers() -> None:
    done = python(USE, str(GOLDEN))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3, 768, 768) 0", "car (100, 50) b'PNG' ['car']", "Florence2Config"]


@pytest.mark.parametrize("module", ["florence2.model.bart", "torch"])
def test_torch_is_really_missing(module: str) -> None:
    assert "ModuleNotFoundError" in python(f"import {module}").stderr
