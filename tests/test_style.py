"""The tree keeps its own rules: short files, imports that run one way, and an import that brings nothing along."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sfr_kernels", "csrc", "tests", "benchmarks")
MOST_LINES = 400

# Imports run one way: a part may import those before it, and itself.
LAYERS = [
    "_version", "atomic", "config", "rows", "reference", "kernels", "ops", "modules", "training", "commands",
    "__main__",
]  # fmt: skip
# And these beside them are for training and the command line alone.
SIDE = {"targets", "evaluation"}


def source_files() -> list[Path]:
    """Tracked and new files that are not ignored; in a tree without git, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*")]
    return [f for f in files if f.suffix in (".py", ".cu", ".cuh", ".cpp", ".h") and f.is_file()]


def test_every_file_is_short():
    files = source_files()
    assert len(files) > 20
    long = {f.relative_to(ROOT).as_posix(): n for f in files if (n := len(f.read_text().splitlines())) > MOST_LINES}
    assert not long, f"longer than {MOST_LINES} lines: {long}"


def test_the_benchmarks_are_read_in_half_an_hour():
    files = [f for f in source_files() if f.is_relative_to(ROOT / "benchmarks")]
    lines = {f: len(f.read_text().splitlines()) for f in files}
    assert len(lines) > 20 and max(lines.values()) <= 300
    collapse = [lines.pop(f) for f in files if f.parent.name == "collapse"]  # two experiments, which are read alone
    assert len(collapse) > 5 and sum(collapse) <= 1125
    assert sum(lines.values()) + len((ROOT / "benchmarks/report/page.html").read_text().splitlines()) <= 3000


def imported_files(path: Path) -> set[Path]:
    """The files of the checkout that one imports by relative imports, anywhere in it. A package stands for its
    `__init__`, but for a name that is a file of it."""
    found, package = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = ROOT.joinpath(*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
        for place in (*(base / alias.name for alias in node.names), base):
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found - {path}


def only_gathers(path: Path) -> bool:
    """Whether a file is a docstring, imports, some of them late, and `__all__`."""
    body = ast.parse(path.read_text()).body[1:]
    late = "if TYPE_CHECKING:", "def __getattr__("
    imports = (ast.Import, ast.ImportFrom)
    return all(isinstance(x, imports) or ast.unparse(x).startswith(("__all__ = ", *late)) for x in body)


@pytest.mark.parametrize("folder", ["benchmarks", "sfr_kernels"])
def test_files_import_each_other_without_a_circle(folder):
    """Imports inside functions count. An `__init__` is left out where it only gathers the names of its package."""
    gathering = {ROOT / folder / name for name in ("__init__.py", "ops/__init__.py", "targets/__init__.py")}
    assert not [f for f in gathering if f.is_file() and not only_gathers(f)]
    graph = {f: imported_files(f) - gathering for f in (ROOT / folder).rglob("*.py") if f not in gathering}
    if folder == "benchmarks":
        assert {ROOT / f"benchmarks/{name}.py" for name in ("case", "problem")} <= graph[ROOT / "benchmarks/limit.py"]
    else:
        assert ROOT / "sfr_kernels/ops/chunks.py" in graph[ROOT / "sfr_kernels/ops/sfr_loss.py"]
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("op, most", [("linear_cross_entropy", 12), ("flow_loss", 15), ("sfr_loss", 19)])
def test_an_op_is_few_files(op, most):
    """What is read to understand an op on the torch backend, beside the contracts in the `__init__` of its kernels."""
    package, seen = ROOT / "sfr_kernels", set()
    todo = [package / f"ops/{op}.py"]
    while todo:
        file = todo.pop()
        other = file.stem in ("triton", "cuda", "one_call", "build", "reference") or file == package / "__init__.py"
        if file in seen or other:
            continue
        seen.add(file)
        todo += imported_files(file)
        if file.name == "__init__.py" and (file.parent / "torch.py").is_file():
            todo.append(file.parent / "torch.py")  # which `dispatch` imports by name
    files = sorted(f.relative_to(package).as_posix() for f in seen if f.name != "__init__.py")
    assert f"ops/{op}.py" in files and "kernels/scale/torch.py" in files and len(files) <= most, files


PUBLIC = {
    "ops/linear_cross_entropy.py: linear_cross_entropy",
    "ops/flow_loss.py: flow_matching_loss",
    "ops/sfr_loss.py: sfr_loss",
    "targets/build.py: build_targets",
}
# Their arguments torch's schemas need one by one.
OPERATORS = {
    "ops/autograd.py: function",
    "ops/autograd.py: fake_function",
    "ops/velocity_head.py: _head_gradients",
    "ops/velocity_head.py: _",
}
# Takes what the kernel `softmax_xent` takes.
BELOW_THE_OPERATORS = {"ops/vocab_parallel.py: sharded_softmax_xent"}


def test_no_function_above_the_operators_has_many_parameters():
    """Past eight, a frozen description is packed once on the way in."""
    found = set()
    for path in PACKAGE:
        if part_of(path) in ("kernels", "reference"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for method in node.body:  # of public modules, twins of the functions
                    method.public = path.name == "modules.py" and not node.name.startswith("_")
            if isinstance(node, ast.FunctionDef) and not getattr(node, "public", False):
                count = sum(a.arg != "self" for a in (*node.args.args, *node.args.kwonlyargs))
                if count > 8:
                    found.add(f"{path.relative_to(ROOT / 'sfr_kernels').as_posix()}: {node.name}")
    assert found == PUBLIC | OPERATORS | BELOW_THE_OPERATORS


def part_of(path: Path) -> str:
    """config, rows, ops, …: the part of the package that a file belongs to."""
    first = path.relative_to(ROOT / "sfr_kernels").parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of sfr_kernels that a file imports, anywhere in it."""
    package, parts = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            full = [*[".".join(filter(None, (*base, alias.name))) for alias in node.names]]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in full if name.startswith("sfr_kernels.")}
    return parts & {*LAYERS, *SIDE}


PACKAGE = [f for f in source_files() if f.suffix == ".py" and f.is_relative_to(ROOT / "sfr_kernels")]
PACKAGE = [f for f in PACKAGE if f != ROOT / "sfr_kernels/__init__.py"]


def test_the_reader_of_imports_sees_them():
    # were it blind, the tests below would pass
    assert imported_parts(ROOT / "sfr_kernels/ops/flow_loss.py") >= {"reference", "config", "rows"}
    assert "ops" in imported_parts(ROOT / "sfr_kernels/modules.py")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    part, imported = part_of(path), imported_parts(path)
    if part in SIDE:
        allowed = SIDE | set(LAYERS[: LAYERS.index("training")])
    else:
        allowed = set(LAYERS[: LAYERS.index(part) + 1])
        allowed |= SIDE if LAYERS.index(part) >= LAYERS.index("training") else set()
    assert imported <= allowed, f"{part} must not import {imported - allowed}"
    if part == "reference":
        assert imported <= {"config", "rows"}
    elif part != "ops":
        assert "reference" not in imported, "only ops may reach the reference: it judges the rest"


CREATIONS = {"zeros", "ones", "full", "empty", "empty_strided", "rand", "randn", "normal", "tensor", "as_tensor"}
CREATIONS |= {"scalar_tensor", "eye", "linspace", "logspace", "Tensor"}


def without_dtype(source: str) -> list[str]:
    """The calls that make a tensor of torch's default dtype, which is the caller's to choose; an arange of integers
    makes none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        name = ast.unparse(node.func).removeprefix("torch.")
        real = any(isinstance(x, ast.Constant) and isinstance(x.value, float) for a in node.args for x in ast.walk(a))
        if (name in CREATIONS or (name == "arange" and real)) and "dtype" not in [k.arg for k in node.keywords]:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_tensor_has_the_default_dtype(path):
    assert len(without_dtype("torch.zeros(3)\ntorch.arange(0.5)\ntorch.arange(n)\ntorch.ones(2, dtype=t)")) == 2
    assert not without_dtype(path.read_text())


IMPORT = """
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import sfr_kernels
seconds = time.perf_counter() - start
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(seconds, *sorted(new & {"triton", "transformers", "accelerate", "sentence_transformers", "datasets", "peft"}))
"""


def test_importing_the_package_is_quick_and_brings_nothing_along():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, *heavy = done.stdout.split()
    assert not heavy, f"importing sfr_kernels imports {heavy}"
    assert float(seconds) < 1.0
