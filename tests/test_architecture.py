"""The rules of docs/architecture.md, enforced."""

import ast
import builtins
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from bench.mutations import MUTATIONS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "exporter").rglob("*.py"))
BANNED_NAMES = {"utils", "util", "helpers", "helper", "base", "common", "misc"}
MAX_LINES = 300
LIST_WIDTH, SCREEN_ROWS = 110, 50  # of the map: characters in the column of files, lines
MAX_FUNCTION_LINES = 40  # of body: a command's options and a docstring's shapes do not count


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """`exporter/methods/rtn.py` -> `methods.rtn`; a package is called by its folder; "" is exporter itself."""
    parts = path.relative_to(ROOT / "exporter").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
ROOMS = sorted(path.parent for path in (ROOT / "exporter").glob("*/__init__.py"))
SHARED = {
    "amounts",
    "api",
    "api_artifacts",
    "cuda_driver",
    "device",
    "distribution",
    "dtypes",
    "errors",
    "events",
    "lazy_torch",
    "transformers_import",
    "out_of_memory",
}  # files beside the rooms
PACKAGES = sorted(path.parent for room in ROOMS for path in room.rglob("__init__.py"))
every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def imported_rooms(package: Path) -> set[str]:
    """The rooms that the files of `package` import, anywhere in them, except what lies inside `package`."""
    names = set()
    inside = ".".join(package.relative_to(ROOT).parts)
    for path in package.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            match node:
                case ast.ImportFrom(module=str(module)):
                    modules = [f"{module}.{alias.name}" for alias in node.names]
                case ast.Import():
                    modules = [alias.name for alias in node.names]
                case _:
                    continue
            names |= {m.split(".")[1] for m in modules if m.startswith("exporter.") and f"{inside}." not in f"{m}."}
    return names - SHARED


@every_package
def test_a_package_says_what_enters_what_leaves_and_which_rooms_it_imports(package):
    lines = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))).split("\n\n")[:2]
    text = " ".join(lines[1].split())
    parts = re.fullmatch(r"Enters: (.+) Leaves: (.+) May import: (.+)\.", text)
    assert parts, text
    declared = set() if parts[3] == "no other room" else set(parts[3].split(", "))
    assert declared == imported_rooms(package)


def test_every_folder_with_code_is_a_package():
    assert {path.parent for path in FILES} == {ROOT / "exporter", *PACKAGES}
    assert 10 <= len(ROOMS) <= 15


def test_files_lie_in_rooms():
    beside = {path.stem for path in (ROOT / "exporter").glob("*.py")}
    assert beside == SHARED | {"__init__", "__main__"}


def test_import_rules_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(CONTRACTS) >= 7
    assert f"{len(CONTRACTS)} kept, 0 broken" in done.stdout


def test_packages_that_hold_packages_have_an_order():
    """One contract says the order of the packages inside a room; a new one must be put into it."""
    for room in ROOMS:
        nested = {path.parent.name for path in room.glob("*/__init__.py")}
        orders = [c["layers"] for c in CONTRACTS if c.get("containers") == [f"exporter.{room.name}"]]
        assert nested <= {name for layers in orders for row in layers for name in row.split(" | ")}, room.name


def map_rows() -> dict[str, str]:
    """Room -> its row in the map of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = text.partition("<!-- rooms:begin -->")[2].partition("<!-- rooms:end -->")[0].strip().splitlines()[2:]
    return {row.split("`")[1]: row for row in rows}


def test_the_map_names_every_file_and_fits_one_screen():
    rows = map_rows()
    assert set(rows) == {room.name for room in ROOMS}
    for room in ROOMS:
        listed = re.findall(r"`([\w/]+)`", rows[room.name].split(" | ")[-1])
        folder, paths = room, set()
        for name in listed:
            if name.endswith("/"):
                folder = room / name
            else:
                paths.add(folder / f"{name}.py")
        assert paths == {path for path in room.rglob("*.py") if path.name != "__init__.py"}, room.name
    lists = [text for row in rows.values() for text in row.split(" | ")[-1].split("<br>")]
    assert sum(-(-len(text) // LIST_WIDTH) for text in lists) <= SCREEN_ROWS


def test_files_are_short_and_well_named():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
    assert [path for path in FILES if path.stem in BANNED_NAMES] == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    rest = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return function.end_lineno - rest[0].lineno + 1 if rest else 0


def test_functions_are_short():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [(path, node) for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
    assert len(functions) > 1000
    long = [
        f"{path}: {node.name}: {body_lines(node)}" for path, node in functions if body_lines(node) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_only_device_asks_for_cuda():
    """The linter bans the name `torch.cuda`; it cannot see `.cuda()` of a tensor, nor a name built from text.

    `cuda_driver` reads for `device` whether torch was built for CUDA.
    """
    asks = re.compile(r"\.cuda\s*\(|torch\.cuda\b|[\"']cuda[\"':]")
    asking = [module_name(path) for path in FILES if asks.search(path.read_text(encoding="utf-8"))]
    assert asking == ["cuda_driver", "device"]


def test_only_the_command_line_prints():
    calls = [(path, node) for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    printing = [path for path, node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert [path for path in printing if not module_name(path).startswith("commands.")] == []


def test_importing_the_package_loads_no_heavy_library():
    """`mmq --help` must answer at once: transformers is imported by the functions that need it."""
    modules = [f"exporter.{module_name(path)}" for path in FILES if module_name(path)]
    heavy = tuple(f"exporter.numerics.{name}_kernel" for name in ("gptq_columns", "ranges", "learned_rounding"))
    light = [name for name in modules if name not in heavy]
    code = f"import importlib, sys\nfor m in {light}: importlib.import_module(m)\nprint('transformers' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "False", done.stdout + done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.description)
def test_mutations_refer_to_existing_lines(mutation):
    """`python -m bench.mutations` applies each mutation and names the test that detects it."""
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.before) == 1


def test_a_class_name_has_one_meaning():
    """Classes and aliases of types have unique names; each method has `Options` and `Statistics` by convention."""
    homes: dict[str, set[str]] = {}
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, set()).add(module_name(path))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name[0].isupper() and not name.isupper():
                    homes.setdefault(name, set()).add(module_name(path))
    shared = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    assert set(shared) <= {"Options", "Statistics"}, shared


def test_docstrings_name_existing_classes():
    """A class in backticks exists in the package, or a file of the package uses it under that name."""
    known = set(dir(builtins)) | {"AutoAWQConfig", "AutoGPTQConfig", "Blip2ForImageTextRetrieval"}  # of transformers
    named = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            match node:
                case ast.ClassDef(name=name) | ast.Name(id=name) | ast.alias(name=name) | ast.Attribute(attr=name):
                    known.add(name)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                names = re.findall(r"`([A-Z][a-z]\w*)`", ast.get_docstring(node) or "")
                named += [(module_name(path), name) for name in names]
    assert [(module, name) for module, name in named if name not in known] == []


def test_only_the_export_itself_is_imported_from_its_page():
    """`pipeline/export.py` is the job on one page; what others need lies in modules of its room."""
    names = set()
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "exporter.pipeline.export":
                names |= {alias.name for alias in node.names}
    assert names == {"export", "Export"}


VAGUE = {"found", "said", "told", "asked", "chosen", "wanted", "seen", "theirs", "mine", "aloud"}
NAMED_FILES = [
    path for folder in ("exporter", "bench", "tools", "docs", "serving") for path in (ROOT / folder).rglob("*.py")
]


def test_names_say_what_a_value_is():
    """A name like `found` or `said` names the moment in which a value was made, not the value."""
    vague = []
    for path in NAMED_FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                    words = set(name.split("_"))
                case ast.ClassDef(name=name):
                    words = set(re.findall("[a-z]+", name.lower()))
                case _:
                    continue
            vague += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}"] if VAGUE & words else []
    assert len(NAMED_FILES) > 300
    assert vague == []
