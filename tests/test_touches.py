"""A run touches only the files it was given and the Python it runs in: no socket, no other process, no pickle.

A separate program is watched by Python's audit hooks, and by recording the calls of the two libraries that open files
without Python, safetensors and tokenizers. The second half shows that the watch sees what it must.
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

    @staticmethod
    def from_str(text):
        return backend.from_str(text)

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

def report():
    import florence2  # not before the parts, which are to import it under watch
    python = {sys.prefix, sys.base_prefix, os.path.dirname(florence2.__file__), *sysconfig.get_paths().values()}
    python |= {*site.getsitepackages(), site.getusersitepackages()}
    machine = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")  # how many cores, how much memory
    own = tuple(os.path.join(os.path.abspath(path), "") for path in python) + machine
    packaging = (".egg-info", ".dist-info")  # metadata of installed packages, in any folder on the path
    files = {p for p in opened if not os.path.dirname(p).endswith(packaging) and not p.startswith(own)}
    foreign = {p for p in libraries if os.path.dirname(p) and not p.startswith(own)}
    return {"files": sorted(files), "events": list(events), "libraries": sorted(foreign)}

reports = []
for code, arguments in json.load(sys.stdin):
    for seen in (opened, events, libraries):
        seen.clear()
    sys.argv[1:] = arguments
    exec(compile(code, "<watched>", "exec"))
    reports.append(report())
print(json.dumps(reports))
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


Report = dict[str, list[str]]


def watch(*parts: tuple[str, Sequence[object]]) -> list[Report]:
    """Return what each part, code and its arguments, did besides importing Python modules; all run in one process.

    That is: files opened, forbidden events, foreign libraries.
    """
    words = [sys.executable, "-B", "-c", WATCH + REPORT]
    given = json.dumps([(code, [str(argument) for argument in arguments]) for code, arguments in parts])
    done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reports: list[Report] = json.loads(done.stdout.splitlines()[-1])
    return reports


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with the other files of published repositories, which nothing may open: code and a pickle."""
    copy_checkpoint(small_folder, tmp_path / "checkpoint")
    for name in ("modeling_florence2.py", "configuration_florence2.py", "processing_florence2.py"):
        (tmp_path / "checkpoint" / name).write_text("raise SystemExit('code from a checkpoint was run')\n")
    config = read_json(tmp_path / "checkpoint" / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    return tmp_path / "checkpoint"


def assert_touches_only(report: Report, files: Sequence[Path]) -> None:
    assert report == {"files": sorted(map(str, files)), "events": [], "libraries": []}


NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")


@pytest.mark.release  # a process that is watched
def test_only_what_is_given_is_touched(folder: Path, picture_file: Path) -> None:
    """By an answer and its drawing, and by the commands that run, audit and inspect."""
    few = ["--model", folder, "--max-new-tokens", 2]
    reports = watch(
        (ANSWER, [folder, picture_file]),
        (COMMAND, ["run", "<CAPTION>", picture_file, *few]),
        (COMMAND, ["audit", folder, folder, "--json"]),
        (COMMAND, ["inspect", "<CAPTION>", picture_file, "--json", *few]),
    )
    needed = [*(folder / name for name in NEEDED), picture_file]
    weights = [folder / "config.json", folder / "model.safetensors"]
    for report, files in zip(reports, (needed, needed, weights, needed), strict=True):
        assert_touches_only(report, files)


# Each line does one thing that none of the runs above may do; sys.argv[1] is a new file.
DEEDS = {
    "import socket; socket.socket().close()": "socket.__new__",
    "socket.gethostbyname('localhost')": "socket.gethostbyname",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "os.system('true')": "os.system",
    "pickle.loads(pickle.dumps(1))": "pickle.loads",
    "import _pickle, pathlib; _pickle.loads(pickle.dumps(pathlib.Path))": "pickle.find_class",
    "import io; b = io.BytesIO(); torch.save({}, b); b.seek(0); torch.load(b)": "torch.load",
    "open(sys.argv[1], 'w').close()": "write {new}",
    "os.close(os.open(sys.argv[1] + '2', os.O_CREAT | os.O_WRONLY))": "write {new}2",
    "os.remove(sys.argv[1])": "os.remove",
}
# Files are opened through Python, and through the libraries that open them below it.
OPEN = """
from safetensors import safe_open
from tokenizers import Tokenizer
open(sys.argv[1]).close()
safe_open(sys.argv[2], framework="pt").__enter__()
Tokenizer.from_file(sys.argv[3])
"""
# The run above with the reading of weights changed to torch's.
LOAD = f"""
import florence2.checkpoints.tensors
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1] + "/model.safetensors"), sys.argv[1] + "/pytorch_model.bin")
florence2.checkpoints.tensors.find_weights.__defaults__ = (True,)
os.remove(sys.argv[1] + "/model.safetensors")
events.clear()
import florence2.loading as loading
load_model = loading.load_model
loading.load_model = lambda path, **k: load_model(path, **k | {{"allow_pickle": True}})
{ANSWER}"""


@pytest.mark.release
def test_the_watch_sees_what_it_must(folder: Path, small_folder: Path, picture_file: Path, tmp_path: Path) -> None:
    given = [picture_file, small_folder / "model.safetensors", small_folder / "tokenizer.json"]
    done, opened, loaded = watch(
        ("import torch\n" + "\n".join(DEEDS), [tmp_path / "new"]), (OPEN, given), (LOAD, [folder, picture_file])
    )
    assert {event.format(new=tmp_path / "new") for event in DEEDS.values()} <= set(done["events"])
    assert opened["files"] == sorted(map(str, given))
    assert str(folder / "pytorch_model.bin") in loaded["files"] and "torch.load" in loaded["events"]
