"""The architecture, read from the import statements: imports point one way, and each dependency has its place."""

import ast
import sys
from pathlib import Path

import pytest

import florence2

PACKAGE = Path(florence2.__file__).parent
ORDER = """
    errors lazy inputs model generation answers fast checkpoints asking processor runner tracing
    stream pipeline loading modify bulk cli
""".split()
EXTRAS = {"dataset", "evaluate", "train", "inspect", "export", "label", "lite", "mcp", "ray", "serve"}
TORCH_FREE = (
    *("errors", "lazy", "inputs", "answers", "asking", "model.config", "generation.options", "generation.labels"),
    *("checkpoints.files", "checkpoints.config_files", "checkpoints.hub", "checkpoints.checks.belonging"),
    *("bulk", "cli"),
)
THIRD_PARTY = {"torch", "safetensors", "huggingface_hub", "tokenizers", "numpy", "PIL"}
KERNELS = "fast.cuda.kernels."
"""May import Triton, which torch's builds for CUDA bring, and is itself imported inside functions alone."""
ONLY_IN = {
    "huggingface_hub": {"checkpoints.hub"},
    "safetensors": {"checkpoints.tensors"},
    "tokenizers": {"inputs.tokenizer"},
    "florence2.checkpoints.layouts": {
        *("checkpoints.adapters", "checkpoints.checkpoint", "checkpoints.describe"),
        *("checkpoints.checks.empty", "checkpoints.checks.reading", "checkpoints.merging.plan"),
    },
}
"""Who alone may import something: the network, the file format, the two layouts of names."""
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
CORE = {module: path for module, path in FILES.items() if module.split(".")[0] in ORDER}


def imports(module: str) -> set[str]:
    """Every module that a file imports anywhere, by statement or as a string given to importlib."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            whole = node.module == "florence2" or f"{node.module.removeprefix('florence2.')}.__init__" in FILES
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("florence2."):
            found.add(node.value)
    return found


def inside(module: str) -> set[str]:
    """The parts of this package that a file imports, without its version."""
    names = {name.removeprefix("florence2.") for name in imports(module) if name.startswith("florence2.")}
    return names - {"__version__"}


def test_every_file_has_a_room() -> None:
    known = {*ORDER, *EXTRAS, "__init__", "__main__"}
    assert {module.split(".")[0] for module in FILES} == known


@pytest.mark.parametrize("module", CORE)
def test_imports_point_one_way(module: str) -> None:
    room = module.split(".")[0]
    allowed = {*ORDER[: ORDER.index(room) + 1]} | (EXTRAS if room == "cli" else set())
    assert {name.split(".")[0] for name in inside(module)} <= allowed


@pytest.mark.parametrize("module", CORE)
def test_only_the_allowed_packages(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(module) if not name.startswith("florence2.")}
    free = module.startswith(TORCH_FREE)
    allowed = THIRD_PARTY - ({"torch", "safetensors"} if free else set()) | (
        {"triton"} if module.startswith(KERNELS) else set()
    )
    assert outside - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("module", [module for module in FILES if module.startswith("lite")])
def test_the_runtime_without_torch(module: str) -> None:
    """It stands on files that are free of torch, and one of its own knows onnxruntime."""
    outside = {name.split(".")[0] for name in imports(module) if not name.startswith("florence2.")}
    allowed = {"numpy", "PIL"} | ({"onnxruntime"} if module == "lite.sessions" else set())
    assert outside - set(sys.stdlib_module_names) <= allowed
    free = (*TORCH_FREE, "lite", "checkpoints.checks.calibration", "__main__")
    assert {name for name in inside(module) if not name.startswith(free)} == set()


def test_a_kernel_is_imported_where_it_runs() -> None:
    """Triton may be missing: no file imports one that needs it when it is itself imported."""
    needing = {f"florence2.{module}" for module in FILES if module.startswith(KERNELS) and "triton" in imports(module)}
    needing -= {f"florence2.{KERNELS}availability"}
    assert needing
    for module, path in FILES.items():
        top = ast.parse(path.read_text(encoding="utf-8")).body
        modules = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert module.startswith(KERNELS) or not modules & needing, module


@pytest.mark.parametrize(("name", "allowed"), ONLY_IN.items())
def test_one_place_each(name: str, allowed: set[str]) -> None:
    assert {
        module for module in CORE if any(f"{found}.".startswith(f"{name}.") for found in imports(module))
    } == allowed


def test_the_search_knows_no_model() -> None:
    files = ("options", "rules", "sampling", "search", "state", "topk")
    known = {"errors", "model.trace", *(f"generation.{file}" for file in files)}
    assert all(inside(f"generation.{file}") <= known for file in files)


@pytest.mark.parametrize("room", [room for room in ORDER if (PACKAGE / room).is_dir()] + ["."])
def test_no_folder_of_the_core_has_more_than_ten_files(room: str) -> None:
    assert len(list((PACKAGE / room).glob("*.py"))) <= 10
