"""What a run touches: the files it was given and the Python it runs in. No socket, no other process, no pickle.

A program of its own is watched by Python's audit hooks, and by recording what is asked of the two libraries that open
files below Python, safetensors and tokenizers. The second half shows that the watch sees what it must.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from florence2.checkpoints.files import read_json
from tests.conftest import copy_checkpoint

WATCH = """
import os, sys

opened, events, libraries = set(), [], set()
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile",
             "pty.spawn", "pickle.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "os.remove", "os.rename",
             "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def watch(event, args):
    if event == "open" and not isinstance(args[0], int):
        opened.add(os.path.abspath(os.fsdecode(args[0])))
        if (args[2] or 0) & WRITING:
            events.append(f"write {args[0]}")
    elif event == "ctypes.dlopen" and args[0]:
        libraries.add(str(args[0]))
    elif event.startswith(FORBIDDEN):
        events.append(event)

import pickle, safetensors, tokenizers, torch  # which look for libraries of theirs, torch's CUDA build by ldconfig
sys.addaudithook(watch)

def recorded(name, function):
    def call(*args, **kwargs):
        events.append(name)
        return function(*args, **kwargs)
    return call

class Tokenizer:
    @staticmethod
    def from_file(path):
        opened.add(os.path.abspath(path))
        return backend.from_file(path)

def safe_open(path, *args, **kwargs):
    opened.add(os.path.abspath(path))
    return open_safetensors(path, *args, **kwargs)

backend, tokenizers.Tokenizer = tokenizers.Tokenizer, Tokenizer
open_safetensors, safetensors.safe_open = safetensors.safe_open, safe_open
for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
    setattr(module, name, recorded(f"{module.__name__}.{name}", getattr(module, name)))
"""
REPORT = """
import json, site, sysconfig
import florence2
python = {sys.prefix, sys.base_prefix, os.path.dirname(florence2.__file__), *sysconfig.get_paths().values()}
python |= {*site.getsitepackages(), site.getusersitepackages()}
machine = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")  # how many cores, how much memory
own = tuple(os.path.join(os.path.abspath(path), "") for path in python) + machine
packaging = (".egg-info", ".dist-info")  # of what is installed, beside it or in a folder that is on the path
opened = {p for p in opened if not os.path.dirname(p).endswith(packaging)}
print(json.dumps({"files": sorted(p for p in opened if not p.startswith(own)), "events": events,
                  "libraries": sorted(p for p in libraries if os.path.dirname(p) and not p.startswith(own))}))
"""
ANSWER = """
import florence2
f = florence2.load(sys.argv[1])
answer = f.run("<OD>", sys.argv[2], options=f.options(max_new_tokens=8))
f.processor.answer("<OD>", "cup<loc_1><loc_2><loc_300><loc_400>", image_size=(320, 200)).draw(sys.argv[2])
"""
COMMAND = """
import contextlib, io
from florence2.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(sys.argv[1:]) == 0
"""


def watched(code: str, *arguments: object) -> dict[str, list[str]]:
    """What the `code` did besides importing Python modules: files opened, forbidden events, foreign libraries."""
    words = [sys.executable, "-B", "-c", WATCH + code + REPORT, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint beside what published repositories hold too, and what nobody should open: code and a pickle."""
    copy_checkpoint(small_folder, tmp_path / "checkpoint")
    for name in ("modeling_florence2.py", "configuration_florence2.py", "processing_florence2.py"):
        (tmp_path / "checkpoint" / name).write_text("raise SystemExit('code from a checkpoint was run')\n")
    config = read_json(tmp_path / "checkpoint" / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    return tmp_path / "checkpoint"


def assert_touches_only(report: dict[str, list[str]], files: Sequence[Path]) -> None:
    assert report == {"files": sorted(map(str, files)), "events": [], "libraries": []}


NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")


def test_an_answer_and_its_drawing(folder: Path, picture_file: Path) -> None:
    files = [*(folder / name for name in NEEDED), picture_file]
    assert_touches_only(watched(ANSWER, folder, picture_file), files)


def test_the_command_line(folder: Path, picture_file: Path) -> None:
    files = [*(folder / name for name in NEEDED), picture_file]
    words = ["run", "<CAPTION>", picture_file, "--model", folder, "--max-new-tokens", 4]
    assert_touches_only(watched(COMMAND, *words), files)


def test_an_audit(folder: Path) -> None:
    report = watched(COMMAND, "audit", folder, folder, "--json")
    assert_touches_only(report, [folder / "config.json", folder / "model.safetensors"])


def test_an_explanation(folder: Path, picture_file: Path) -> None:
    words = ["inspect", "<CAPTION>", picture_file, "--model", folder, "--json", "--max-new-tokens", 2]
    assert_touches_only(watched(COMMAND, *words), [*(folder / name for name in NEEDED), picture_file])


def test_the_watch_sees_what_is_forbidden(tmp_path: Path) -> None:
    """Each line does one thing that none of the runs above may do."""
    deeds = {
        "import socket; socket.socket().close()": "socket.__new__",
        "socket.gethostbyname('localhost')": "socket.gethostbyname",
        "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
        "os.system('true')": "os.system",
        "pickle.loads(pickle.dumps(1))": "pickle.loads",
        "import _pickle, pathlib; _pickle.loads(pickle.dumps(pathlib.Path))": "pickle.find_class",
        "import io; b = io.BytesIO(); torch.save({}, b); b.seek(0); torch.load(b)": "torch.load",
        "open(sys.argv[1], 'w').close()": f"write {tmp_path / 'new'}",
        "os.close(os.open(sys.argv[1] + '2', os.O_CREAT | os.O_WRONLY))": f"write {tmp_path / 'new2'}",
        "os.remove(sys.argv[1])": "os.remove",
    }
    report = watched("\n".join(deeds) + "\n", tmp_path / "new")
    assert set(deeds.values()) <= set(report["events"])


def test_the_watch_sees_files(small_folder: Path, picture_file: Path) -> None:
    """Through Python, and through the libraries that open them below it."""
    code = """
from safetensors import safe_open
from tokenizers import Tokenizer
open(sys.argv[1]).close()
safe_open(sys.argv[2], framework="pt").__enter__()
Tokenizer.from_file(sys.argv[3])
"""
    given = [picture_file, small_folder / "model.safetensors", small_folder / "tokenizer.json"]
    assert watched(code, *given)["files"] == sorted(map(str, given))


def test_loading_by_torch_would_be_seen(folder: Path, picture_file: Path) -> None:
    """The same run with the reading of weights changed to torch's."""
    code = f"""
import florence2.checkpoints.tensors
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1] + "/model.safetensors"), sys.argv[1] + "/pytorch_model.bin")
florence2.checkpoints.tensors.find_weights.__defaults__ = (True,)
os.remove(sys.argv[1] + "/model.safetensors")
events.clear()
import florence2.pipeline as pipeline
load_model = pipeline.load_model
pipeline.load_model = lambda path, **k: load_model(path, **k | {{"allow_pickle": True}})
{ANSWER}"""
    report = watched(code, folder, picture_file)
    assert str(folder / "pytorch_model.bin") in report["files"] and "torch.load" in report["events"]
