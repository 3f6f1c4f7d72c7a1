"""`import florence2` starts nothing, needs nothing beyond the core packages, and leaves the process as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import florence2

FOREIGN = """
    transformers timm einops torchvision cv2 flash_attn scipy pandas matplotlib accelerate peft pycocotools rapidfuzz
""".split()


def python(code: str, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.release  # a process that answers
def test_it_works_where_nothing_else_can_be_imported(small_folder: Path, picture_file: Path) -> None:
    """With every foreign package blocked, a checkpoint is loaded and answers."""
    code = f"""
import sys
for name in {FOREIGN}:
    sys.modules[name] = None
import florence2
f = florence2.load(sys.argv[1])
print(f.run("<OD>", sys.argv[2], options=f.options(max_new_tokens=4)).finish_reason)
"""
    assert python(code, str(small_folder), str(picture_file)).strip() == "length"


def test_importing_loads_neither_the_hub_nor_a_compiler_nor_anything_foreign(small_folder: Path) -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import florence2
florence2.load(sys.argv[1])
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({[*FOREIGN, "huggingface_hub", "sympy", "requests", "httpx"]})))
"""
    assert python(code, str(small_folder)).strip() == "[]"


@pytest.mark.release
def test_importing_changes_no_setting_and_writes_no_file(tmp_path: Path) -> None:
    code = """
import json, os, sys, threading, warnings, logging
import numpy, torch, PIL.Image, PIL.ImageFile, tokenizers, safetensors
def state():
    return [
        dict(os.environ), torch.get_num_threads(), torch.get_default_dtype().__repr__(), torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32, PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
        len(warnings.filters), logging.getLogger().level, threading.active_count(), os.getcwd(), torch.initial_seed(),
    ]
before = state()
import florence2, florence2.cli.main
print(json.dumps([before == state(), os.listdir(".")]))
"""
    assert json.loads(python(code, cwd=tmp_path)) == [True, []]


def test_what_needs_no_torch_works_without_it() -> None:
    """Tasks, prompts, answers and errors, for whoever runs no model in this process."""
    code = """
import sys
sys.modules["torch"] = None
import florence2, florence2.inputs.tasks, florence2.inputs.processor, florence2.answers.cascade
answer = florence2.answers.answer.parse_answer("<OD>", "boxes", "cup<loc_0><loc_0><loc_9><loc_9>", (100, 100))
print(florence2.TASKS["<OD>"].alias, florence2.__version__, answer.boxes[0].label, florence2.Florence2Error.__name__)
try:
    florence2.load
except ImportError:
    print("load needs torch")
"""
    assert python(code).splitlines() == [f"od {florence2.__version__} cup Florence2Error", "load needs torch"]


def test_names_are_resolved_without_torch(small_folder: Path) -> None:
    """Local paths and wrong names need neither torch nor the Hub's client."""
    code = """
import sys
sys.modules["torch"] = sys.modules["huggingface_hub"] = None
from florence2.checkpoints.hub import DEFAULT_MODEL, EMBEDDED_MODEL, NAMES, HubError, download, resolve
assert DEFAULT_MODEL in NAMES
print(resolve(sys.argv[1]) == resolve(sys.argv[1] + "/model.safetensors").parent)
print(resolve(EMBEDDED_MODEL) == download(EMBEDDED_MODEL))
for name, revision in (("wrong", None), (EMBEDDED_MODEL, "v2")):
    try:
        resolve(name, revision)
    except HubError as error:
        print(str(error)[:36])
"""
    lines = ["True", "True", "'wrong' is not an existing path: it ", "nano is on this machine, not on the "]
    assert python(code, str(small_folder)).splitlines() == [line[:36] for line in lines]


def test_public_names_are_listed_and_imported_once() -> None:
    assert {*florence2.__all__, "__version__"} <= {*dir(florence2)}
    assert florence2.load is florence2.load and florence2.Florence2 is type(florence2.load("nano"))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        florence2.lod  # type: ignore[attr-defined]  # noqa: B018
    namespace: dict[str, object] = {}
    exec("from florence2 import *", namespace)
    assert {*florence2.__all__} <= {*namespace}


def test_every_public_name_is_documented() -> None:
    for name in florence2.__all__:
        assert getattr(florence2, name) is not None
        value = getattr(florence2, name)
        assert name == "TASKS" or (value.__doc__ or "").strip(), name


def test_the_version_is_the_packages() -> None:
    text = (Path(florence2.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{florence2.__version__}"' in text
