# SPDX-License-Identifier: Apache-2.0
"""The package as it is shipped: what the wheel holds, and that it works far from the tree without extras."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WHEELS = ("wheel", "wheel from the sdist")
MAPPED = {"rcc_hf": "src/rcc_hf", "rcc_hf/modeling": "modeling"}

REPORT = """\
import importlib, importlib.metadata, json, pkgutil
import rcc_hf, rcc_hf.modeling

modeling = [f"rcc_hf.modeling.{module.name}" for module in pkgutil.iter_modules(rcc_hf.modeling.__path__)]
modules = [rcc_hf, rcc_hf.modeling, *map(importlib.import_module, modeling)]
print(json.dumps({
    "files": {module.__name__: module.__file__ for module in modules},
    "versions": [rcc_hf.__version__, importlib.metadata.version("rcc_hf")],
    "top_level": [name for name in ("modeling", "tests", "src") if importlib.util.find_spec(name)],
}))
"""


def shell(*command: object, cwd: Path) -> str:
    """Returns what a command prints; its messages are in the failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is in the repository, without what builds and tools have left in it."""
    copy = tmp_path_factory.mktemp("tree")
    left_over = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*_cache", "checkpoints")
    for folder in ("src", "modeling", "tests", "examples"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=left_over)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shell(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return next(folder.glob("rcc_hf-*.tar.gz"))


@pytest.fixture(scope="module")
def wheels(tree, sdist, tmp_path_factory) -> dict[str, Path]:
    """Both ways to a wheel; without isolation, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    shell(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return {name: next(parent.glob("*.whl")) for name, parent in zip(WHEELS, (folder, sdist.parent), strict=True)}


@pytest.fixture(scope="module")
def metadata(wheels) -> Message:
    with zipfile.ZipFile(wheels["wheel"]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def required_only(metadata, tmp_path_factory) -> Path:
    """A folder for `sys.path` with links to what `rcc_hf` requires without extras, and to nothing else."""
    folder = tmp_path_factory.mktemp("required")
    for found in closure(Requirement(line) for line in metadata.get_all("Requires-Dist")):
        for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(found.locate_file(name))
    return folder


def closure(requirements: Iterable[Requirement]) -> list[Distribution]:
    """Returns the installed distributions that meet the requirements, and theirs in turn."""
    pending, seen, found = list(requirements), set(), []
    while pending:
        requirement = pending.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        found.append(distribution(requirement.name))
        for inner in map(Requirement, found[-1].requires or []):
            if inner.marker and any(inner.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                inner.marker = None
            pending.append(inner)
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.mark.parametrize("name", WHEELS)
def test_wheel_holds_the_package_and_nothing_else(name, tree, wheels):
    expected = {
        f"{package}/{file.relative_to(tree / folder).as_posix()}"
        for package, folder in MAPPED.items()
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    assert "rcc_hf/py.typed" in expected
    assert "rcc_hf/modeling/__init__.py" in expected
    assert {file for file in contents(wheels[name]) if ".dist-info/" not in file} == expected


def test_wheel_from_the_sdist_is_the_same(wheels):
    direct, by_sdist = (contents(wheels[name]) for name in WHEELS)
    assert direct == by_sdist


def test_sdist_holds_what_a_build_and_a_test_run_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert names >= {"setup.cfg", "pyproject.toml", "LICENSE", "Makefile", "modeling/__init__.py", "tests/conftest.py"}
    assert not [name for name in names if "checkpoints/" in name or "__pycache__" in name]


def test_metadata(metadata, wheels):
    required = {Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch", "transformers", "safetensors", "huggingface_hub", "tqdm"}
    assert (metadata["Name"], metadata["License-Expression"]) == ("rcc_hf", "Apache-2.0")
    files = contents(wheels["wheel"])
    licence = next(name for name in files if name.endswith("/licenses/LICENSE"))
    assert files[licence] == (ROOT / "LICENSE").read_bytes()
    assert b"rcc = rcc_hf.cli:main" in next(text for name, text in files.items() if name.endswith("/entry_points.txt"))


@pytest.mark.parametrize("name", WHEELS)
def test_installed_wheel_works_far_from_the_tree(name, wheels, required_only, tmp_path):
    """In an environment of its own, where the editable install of the repository is out of sight."""
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    shell(sys.executable, "-m", "pip", "--python", python, *install, wheels[name], cwd=tmp_path)
    packages = next(place.glob("lib/python*/site-packages"))
    (packages / "required.pth").write_text(f"{required_only}\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    report = json.loads(shell(python, "-c", REPORT, cwd=empty))
    assert [file for file in report["files"].values() if not Path(file).is_relative_to(packages)] == []
    assert "rcc_hf.modeling.modeling_rcc" in report["files"]
    assert report["versions"] == [setup_cfg()["metadata"]["version"]] * 2
    assert report["top_level"] == []
    if name == "wheel":
        assert "usage: rcc" in shell(place / "bin" / "rcc", "--help", cwd=empty)


def test_tools_agree_with_setup_cfg():
    """Python's lowest version is the one fact that a tool needs and cannot read in setup.cfg."""
    target = re.search(r'^target-version = "py3(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert setup_cfg()["options"]["python_requires"] == f">=3.{target[1]}"
