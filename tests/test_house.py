"""The rules of the house that no linter knows: order of imports, sizes, and what must stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "analysis", "experiments")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

# Path, or path::function -> why it may be longer.
ALLOWED_LONG: dict[str, str] = {}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(code: str) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write it out"
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def forbidden_imports(package: str, code: str) -> set[str]:
    """Imports that break the order lightning_modules <- analysis <- experiments."""
    found = set(imported_modules(code))
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    broken = {name for name in found if name.split(".")[0] in (*later, "tests")}
    if package == "analysis":
        allowed = ("lightning_modules.tracking.records", "lightning_modules.errors")
        broken |= {name for name in found if name.split(".")[0] in ("torch", "pytorch_lightning", "diffusers")}
        broken |= {
            name
            for name in found
            if name.startswith("lightning_modules")
            and not any(name == whole or name.startswith(f"{whole}.") for whole in allowed)
            and name != "lightning_modules.tracking"  # `from lightning_modules.tracking import records`
        }
    return broken


def overlong(path: str, code: str) -> list[str]:
    """Files and functions beyond the limits, as keys of `ALLOWED_LONG`.

    A function's docstring does not count: it is the contract, which must be complete, and not what one has to follow.
    """
    found = [path] if len(code.splitlines()) > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}::{node.name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    broken = {
        str(path.relative_to(ROOT)): names
        for path in sources(package)
        if (names := forbidden_imports(package, path.read_text()))
    }
    assert broken == {}


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("lightning_modules", "def f():\n    from analysis.runs import load_runs"),
        ("lightning_modules", "import experiments.demo"),
        ("analysis", "import experiments"),
        ("analysis", "import torch.nn"),
        ("analysis", "from lightning_modules import diffusion"),
        ("analysis", "from lightning_modules.tracking import store"),
        ("experiments", "from tests.oracles import gramian"),
    ],
)
def test_a_wrong_import_is_found(package, code):
    assert forbidden_imports(package, code)


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("lightning_modules", "import torch"),
        ("analysis", "from lightning_modules.tracking import records"),
        ("analysis", "from lightning_modules.errors import UserInputError"),
        ("experiments", "from analysis.runs import load_runs\nimport lightning_modules.diffusion"),
    ],
)
def test_a_right_import_passes(package, code):
    assert not forbidden_imports(package, code)


def test_files_and_functions_are_short():
    found = {
        long
        for path in sources(*PACKAGES, "tests")
        for long in overlong(path.relative_to(ROOT).as_posix(), path.read_text())
    }
    assert found == set(ALLOWED_LONG)


def test_length_counts_what_a_reader_must_follow():
    function = "@decorator\ndef f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    documented = function.replace("    x", '    """A contract\n\n    of three lines."""\n    x', 1)
    assert overlong("a.py", function) == overlong("a.py", documented) == []
    assert overlong("a.py", function + "    x = 1\n") == overlong("a.py", documented + "    x = 1\n") == ["a.py::f"]
    assert overlong("a.py", "x = 1\n" * MAX_FILE_LINES) == []
    assert overlong("a.py", "x = 1\n" * (MAX_FILE_LINES + 1)) == ["a.py"]


@pytest.mark.parametrize("package", ["lightning_modules", "lightning_modules/tracking"])
def test_packages_on_the_way_to_the_schema_import_nothing(package):
    assert list(imported_modules((ROOT / package / "__init__.py").read_text())) == []


def test_analysis_runs_without_torch():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("analysis")]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_package_registry():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    # Split up, so that this file does not name them either.
    hosts = [
        host + end
        for host, end in [("pypi", ".org"), ("pythonhosted", ".org"), ("npmjs", ".org"), ("anaconda", ".org")]
    ]
    hosts += ["download." + "pytorch.org"]
    texts = [ROOT / file for file in files if (ROOT / file).is_file() and (ROOT / file).stat().st_size < 1_000_000]
    named = [(path.name, host) for path in texts for host in hosts if host.encode() in path.read_bytes()]
    assert named == []
