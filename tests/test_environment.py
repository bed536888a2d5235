"""environment.yml and constraints.txt against pyproject.toml and against what is installed here.

No conda channel is asked: every line is parsed by rattler, conda's own grammar, and its range is compared.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rattler import MatchSpec
from rattler.exceptions import InvalidMatchSpecError

ROOT = Path(__file__).parents[1]

PYPI_NAME = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
"""conda-forge's name -> PyPI's, where they differ."""
CONDA_ONLY = {"python", "pip"}
"""What conda must be told and pip brings along."""


def declared_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def conda_lines() -> list[str]:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def pypi_name(spec: MatchSpec) -> str:
    return canonicalize_name(PYPI_NAME.get(spec.name.normalized, spec.name.normalized))


def extra_packages(requirement: Requirement) -> set[str]:
    """Packages that the extras of a requirement add, by the installed package's own metadata."""
    packages = set()
    for line in importlib.metadata.requires(requirement.name) or []:
        part = Requirement(line)
        wanted = part.marker is not None and any(part.marker.evaluate({"extra": extra}) for extra in requirement.extras)
        if wanted and not part.marker.evaluate({"extra": ""}) and not part.extras:
            packages.add(canonicalize_name(part.name))
    return packages


def check_environment(lines: list[str], requirements: dict[str, Requirement]) -> list[str]:
    """What is wrong with the lines of a conda environment, one sentence each."""
    problems = []
    ranges: dict[str, SpecifierSet] = {}
    for line in lines:
        try:
            spec = MatchSpec(line, strict=True)
        except InvalidMatchSpecError as error:
            problems.append(f"{line!r} is no conda spec: {error}")
            continue
        ranges[pypi_name(spec)] = SpecifierSet(spec.version or "")

    from_extras = {package for requirement in requirements.values() for package in extra_packages(requirement)}
    expected = requirements.keys() | from_extras | CONDA_ONLY
    problems += [f"{name} is missing" for name in sorted(expected - ranges.keys())]
    problems += [f"{name} is not in pyproject.toml" for name in sorted(ranges.keys() - expected)]
    for name, conda_range in ranges.items():
        if name in requirements and conda_range != requirements[name].specifier:
            problems.append(f"{name}: {conda_range} here, {requirements[name].specifier} in pyproject.toml")
        if name in expected - CONDA_ONLY:
            installed = importlib.metadata.version(name)
            if not conda_range.contains(installed, prereleases=True):
                problems.append(f"{name}: {installed} is installed, outside {conda_range}")
    return problems


def test_environment_agrees_with_pyproject_and_with_this_installation():
    assert check_environment(conda_lines(), declared_requirements()) == []


def test_python_is_the_one_pyproject_asks_for():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"python {requires}" in conda_lines()


@pytest.mark.parametrize(
    ("line", "replacement", "problem"),
    [
        ("rich >=13", "rich >>13", "'rich >>13' is no conda spec"),
        ("rich >=13", "rich >=13 or newer", "is no conda spec"),
        ("rich >=13", None, "rich is missing"),
        ("rich >=13", "richer >=13", "richer is not in pyproject.toml"),
        ("rich >=13", "rich >=12", "rich: >=12 here, >=13 in pyproject.toml"),
        ("rich >=13", "rich >=13,<14", "is installed, outside <14,>=13"),
        ("typeshed-client >=2.1", None, "typeshed-client is missing"),
    ],
)
def test_a_wrong_line_is_found(line, replacement, problem):
    lines = conda_lines()
    at = lines.index(line)
    lines[at : at + 1] = [] if replacement is None else [replacement]
    assert any(problem in found for found in check_environment(lines, declared_requirements()))


def pinned_versions() -> dict[str, str]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line)
            assert match, f"constraints.txt pins no plain version in {line!r}"
            pins[canonicalize_name(match[1])] = match[2]
    return pins


def test_every_declared_package_is_pinned_within_its_range():
    pins = pinned_versions()
    for name, requirement in declared_requirements().items():
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{name}=={pins[name]}"


@pytest.mark.skipif((Path(sys.prefix) / "conda-meta").exists(), reason="conda chose the versions here, not pip")
def test_the_tested_versions_are_the_installed_ones():
    pins = pinned_versions()
    installed = {canonicalize_name(d.name): d.version.split("+")[0] for d in importlib.metadata.distributions()}
    unpinned = installed.keys() - pins.keys() - {"dtr-lab", "pip"}
    assert not unpinned, f"installed but not in constraints.txt: {sorted(unpinned)}"
    drifted = {name: (pin, installed[name]) for name, pin in pins.items() if installed.get(name, pin) != pin}
    assert not drifted, f"constraints.txt has (left), installed is (right): {drifted}"
