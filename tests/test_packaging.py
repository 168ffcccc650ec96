"""What is installed, and what is imported when: one-way imports, and a face that starts fast."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import geoengine
from geoengine.kernels import _topk_cpu

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]

# A package may import itself and those of a lower rank.
RANKS = {"kernels": 0, "engine": 1, "export": 2, "training": 3, "bench": 4, "geoengine": 5}

# Slow to import, or not part of a base install.
HEAVY = {"cv2", "httpcore", "onnx", "onnxruntime", "onnx_ir", "open_clip", "PIL", "pillow_heif", "pmtiles"}
HEAVY |= {"sqlite3", "tensorrt", "torch"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str | None:
    """The project's package that a module is part of: `geoengine` for its face, None for other people's."""
    parts = module.split(".")
    if parts[0] != "geoengine":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANKS else "geoengine"


@pytest.mark.parametrize("folder", RANKS)
def test_imports_point_one_way(folder):
    for path, tree in sources(folder):
        for module in imported_modules(tree):
            package = package_of(module)
            allowed = package is None or package == folder or RANKS[package] < RANKS[folder]
            assert allowed, f"{path} imports {module}"


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, but for those under TYPE_CHECKING."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting.extend(statement.orelse)
            continue
        inner = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
        waiting.extend(inner)
        yield statement


@pytest.mark.parametrize("folder", ["kernels", "engine", "geoengine"])
def test_heavy_modules_are_imported_where_they_are_needed(folder):
    for path, tree in sources(folder):
        for statement in at_import(tree):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                # OpenCV and SQLite may be: the planet and MBTiles, themselves imported only where such a
                # source is opened, use them throughout.
                heavy = {module.split(".")[0] for module in imported_modules(statement)}
                heavy &= HEAVY - {"cv2", "sqlite3"}
                assert not heavy, f"{path}:{statement.lineno} imports {heavy} on import"


def test_importing_the_face_loads_nothing_heavy():
    loaded = run_python("import geoengine, sys; print(*(name.split('.')[0] for name in sys.modules))")
    assert "geoengine" in loaded.split()
    assert not HEAVY & set(loaded.split())


def test_help_loads_nothing_heavy():
    code = """
import sys
sys.argv = ["geoengine", "--help"]
from geoengine.cli import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
print("modules:", *(name.split(".")[0] for name in sys.modules))
"""
    text, _, loaded = run_python(code).partition("modules:")
    assert "locate" in text
    assert not (HEAVY | {"numpy", "rich"}) & set(loaded.split())


def test_the_command_is_installed():
    command = Path(sysconfig.get_path("scripts")) / "geoengine"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "locate" in done.stdout
    assert done.stderr == ""


def test_engine_and_kernels_import_without_torch():
    code = """
import importlib, pkgutil, sys
for name in ("torch", "open_clip", "onnx", "onnx_ir", "tensorrt"):
    sys.modules[name] = None
import geoengine.engine, geoengine.kernels
for package in (geoengine.engine, geoengine.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        print(importlib.import_module(module.name).__name__)
"""
    imported = run_python(code).split()
    assert {"geoengine.engine.tiles", "geoengine.kernels.reference"} <= set(imported)


def test_the_version_is_written_in_pyproject_alone():
    expected = PROJECT["project"]["version"]
    assert version("geoengine") == geoengine.__version__ == expected
    files = [ROOT / "CMakeLists.txt", *(path for folder in RANKS for path in (ROOT / folder).rglob("*.py"))]
    for path in files:
        assert f'"{expected}"' not in path.read_text(), f"{path} repeats the version"


def test_the_face_has_at_most_ten_names_and_all_of_them_exist():
    assert len(geoengine.__all__) <= 10
    assert geoengine.__all__ == sorted(geoengine.__all__)
    for name in geoengine.__all__:
        assert getattr(geoengine, name).__name__ == name
    assert set(geoengine.__all__) <= set(dir(geoengine))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = geoengine.nothing


@pytest.mark.parametrize(
    ("system", "machine", "wheel"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_every_machine_gets_exactly_one_onnx_runtime(system, machine, wheel):
    texts = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["gpu"]
    requirements = [Requirement(text) for text in texts]
    environment = {"sys_platform": system, "platform_machine": machine}
    chosen = {
        requirement.name
        for requirement in requirements
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    }
    assert chosen == {wheel}


def test_a_base_install_needs_neither_torch_nor_onnx():
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert not names & {"onnx", "onnx-ir", "open-clip-torch", "open_clip_torch", "opencv-python", "torch"}


def test_type_checkers_see_the_installed_layout():
    typings = ROOT / "typings" / "geoengine"
    for package, folder in PACKAGES.items():
        if package != "geoengine":
            assert (typings / package.removeprefix("geoengine/")).resolve() == ROOT / folder
    for entry in (ROOT / "geoengine").iterdir():
        if entry.name != "__pycache__":
            assert (typings / entry.name).resolve() == entry, (
                f"typings/geoengine needs a link to {entry.name}"
            )


def test_the_stub_names_what_the_extension_has():
    tree = ast.parse((ROOT / "kernels" / "_topk_cpu.pyi").read_text())
    stubs = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(stubs) == {name for name in vars(_topk_cpu) if not name.startswith("_")}
    for name, arguments in stubs.items():
        signature = getattr(_topk_cpu, name).__doc__.splitlines()[0]
        listed = re.findall(r"(?:\(|, )(\w+): ", signature)
        assert listed == [argument.arg for argument in arguments.args + arguments.kwonlyargs], signature
        assert (", *, " in signature) == bool(arguments.kwonlyargs)


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "make locate" in text
    assert "make test" in text


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
