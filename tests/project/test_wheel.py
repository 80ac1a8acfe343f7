"""The wheel and the sdist: they build, and work in a fresh environment outside the checkout.

Needs the extra `dev`, and an index that pip can reach; `.ci/run` runs it.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.release, pytest.mark.timeout(600)]
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "site", "*.egg-info", "__pycache__"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"),
)
INSTALL = ("install", "-q", "--disable-pip-version-check")
IMPORT_ALL = """
import importlib, pkgutil
import foldlog, foldlog.testing, foldlog.cli
found = [module.name for module in pkgutil.walk_packages(foldlog.__path__, "foldlog.")]
for name in found:
    importlib.import_module(name)
print(len(found), foldlog.__version__, foldlog.__file__)
"""


def run(*args: str | Path, cwd: Path) -> str:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        list(map(str, args)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from that sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--outdir", folder, source, cwd=folder)
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def fresh(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    programs = folder / "env" / "bin"
    run(programs / "pip", *INSTALL, *dist.glob("*.whl"), cwd=folder)
    return programs


def test_the_wheel_holds_the_package_its_types_and_the_license_and_no_more(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (
            archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")
        )
    expected = {
        "foldlog/"
        f"{file.relative_to(ROOT / 'foldlog') if package == 'foldlog' else file.relative_to(ROOT)}"
        for package in ("foldlog", "protocol", "storage", "actors")
        for file in (ROOT / package).rglob("*.py")
    }
    assert {name for name in names if ".dist-info/" not in name} == expected | {"foldlog/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    message = email.message_from_string(metadata)
    assert message["Name"] == "foldlog"
    assert message["License-Expression"] == "MIT"
    assert message["Requires-Python"] == ">=3.11"
    assert message["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in message.get_all("Classifier", [])
    assert {"test", "dev", "docs", "bench"} <= set(message.get_all("Provides-Extra", []))
    assert f"## {message['Version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_sdist_holds_what_the_readme_speaks_of(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "mkdocs.yml"} <= names
    assert {".ci/run", "docs/tutorial.md", "tests/conftest.py"} <= names
    assert {"foldlog/protocol/frames.py", "foldlog/py.typed"} <= names
    assert "tests/storage/formats/golden/empty.hex" in names
    left = (".pyc", ".log", ".foldlog-lock", ".foldlog-note")
    assert [name for name in names if name.endswith(left)] == []


def test_the_wheel_works_in_a_fresh_environment(fresh: Path, tmp_path: Path) -> None:
    run(fresh / "pip", "check", cwd=tmp_path)
    told = run(fresh / "python", "-W", "error", "-c", IMPORT_ALL, cwd=tmp_path)
    count, version, where = told.split()
    assert int(count) > 40
    assert Path(where).is_relative_to(fresh.parent)
    assert run(fresh / "foldlog", "--version", cwd=tmp_path) == f"foldlog, version {version}\n"
    assert run(fresh / "foldlog", "demo", cwd=tmp_path).count("verified against a dict") == 2


def test_the_tests_that_come_with_the_sdist_have_all_they_need(
    dist: Path, fresh: Path, tmp_path: Path
) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (wheel,) = dist.glob("*.whl")
    run(fresh / "pip", *INSTALL, f"{wheel}[test]", cwd=tmp_path)
    tests = ("project/test_layout.py", "protocol/test_tokens.py", "storage/formats/test_golden.py")
    out = run(fresh / "pytest", "-q", *(f"tests/{test}" for test in tests), cwd=source)
    assert " passed" in out
