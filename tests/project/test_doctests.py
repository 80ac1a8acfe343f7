"""The examples in docstrings run, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import foldlog
import foldlog.testing
from foldlog.storage.log.files import Files

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(foldlog.__path__, "foldlog.")
    if not found.ispkg and not found.name.endswith("__main__")
)
ROOTS = [
    (f"{module.__name__}.{name}", getattr(module, name))
    for module in (foldlog, foldlog.testing)
    for name in module.__all__
]


def examples_of(name: str) -> list[doctest.DocTest]:
    # As after `import foldlog` and `from foldlog import ...`.
    names = {**vars(foldlog), "foldlog": foldlog}
    module = importlib.import_module(name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names)
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_of_a_module_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, test in enumerate(examples_of(name)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        told: list[str] = []
        doctest.DocTestRunner().run(test, out=told.append)
        assert not told, "".join(told)


def test_the_doors_of_the_library_have_examples() -> None:
    found = {test.name for name in MODULES for test in examples_of(name)}
    assert {
        "foldlog.store.open",
        "foldlog.follow.follow",
        "foldlog.storage.engines.append_log.store.AppendLogSnapshot",
        "foldlog.storage.difference.diff",
        "foldlog.protocol.tokens.VersionToken",
        "foldlog.protocol.tokens.WatchCursor",
    } <= found


def public_members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`value`, its public methods and properties, by dotted name; not those of other classes."""
    yield name, value
    if not inspect.isclass(value):
        return
    for owner in value.__mro__:
        if owner.__module__.partition(".")[0] == "foldlog":
            for member_name, member in vars(owner).items():
                unwrapped = getattr(member, "__func__", member)
                if not member_name.startswith("_") and (
                    inspect.isfunction(unwrapped) or isinstance(member, property)
                ):
                    yield f"{name}.{member_name}", getattr(value, member_name, member)


def documented(value: Any) -> bool:
    text = inspect.getdoc(value)
    if not text or (inspect.isclass(value) and not value.__dict__.get("__doc__")):
        return False
    # What namedtuples and dataclasses get by themselves is no documentation.
    return not text.startswith(f"{getattr(value, '__name__', '?')}(")


@pytest.mark.parametrize(("name", "value"), ROOTS, ids=[name for name, _ in ROOTS])
def test_a_public_name_and_its_methods_have_docstrings(name: str, value: Any) -> None:
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a value or a type: its module tells it
    missing = [
        member_name
        for member_name, member in public_members(name, value)
        if not documented(member)
        and not (name.endswith("Files") and hasattr(Files, member_name.split(".")[-1]))
    ]
    assert missing == []
