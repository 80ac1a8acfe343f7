"""The layout: who may import whom, which names are public, and that the pages are true of both."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import foldlog
from foldlog import AppendLogSnapshot, KvEntry, VersionToken, WatchCursor

ROOT = Path(__file__).resolve().parents[2]
LADDER = ("protocol", "storage", "actors", "foldlog")
"""From the bottom up. A package imports itself and what stands before it."""
FILES = sorted(
    Path(directory) / name
    for directory, _, names in os.walk(ROOT / "foldlog", followlinks=True)
    for name in names
    if name.endswith(".py")
)


parsed = functools.cache(ast.parse)


def rung_of(module: str) -> int | None:
    """The rung of a module by its dotted name; None for one that is not ours."""
    parts = module.split(".")
    if parts[0] != "foldlog":
        return None
    return (
        LADDER.index(parts[1])
        if len(parts) > 1 and parts[1] in LADDER[:-1]
        else LADDER.index("foldlog")
    )


def imported_modules(source: str, package: str) -> list[str]:
    """The dotted names of all modules imported anywhere in `source`, a module of `package`."""
    modules: list[str] = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*start, *([node.module] if node.module else [])])
            modules += [f"{base}.{alias.name}" for alias in node.names]
    return modules


def climbs(source: str, package: str) -> list[str]:
    """The imports of `source` that go up the ladder."""
    rungs = [(module, rung_of(module)) for module in imported_modules(source, package)]
    here = rung_of(package)
    assert here is not None
    return [module for module, rung in rungs if rung is not None and rung > here]


def package_of(file: Path) -> str:
    """The dotted name of the package that holds `file`."""
    return ".".join(file.parent.relative_to(ROOT).parts)


def test_imports_never_run_back_up_the_ladder() -> None:
    found = {file: climbs(file.read_text(encoding="utf-8"), package_of(file)) for file in FILES}
    assert {file: modules for file, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("from foldlog.storage import fold", "foldlog.protocol", ["foldlog.storage.fold"]),
        (
            "def f():\n    import foldlog.actors.writer",
            "foldlog.storage",
            ["foldlog.actors.writer"],
        ),
        ("from foldlog import Put", "foldlog.storage", ["foldlog.Put"]),
        ("from foldlog import actors", "foldlog.storage", ["foldlog.actors"]),
        ("from ..actors import writer", "foldlog.storage", ["foldlog.actors.writer"]),
        (
            "from foldlog.version import __version__",
            "foldlog.protocol",
            ["foldlog.version.__version__"],
        ),
        (
            "from .leaf import find\nfrom foldlog.protocol import errors\nimport os",
            "foldlog.storage",
            [],
        ),
        ("from foldlog.actors import writer", "foldlog.cli", []),
    ],
)
def test_an_import_up_the_ladder_is_found_in_every_spelling(
    source: str, package: str, found: list[str]
) -> None:
    assert climbs(source, package) == found


def module_of(file: Path) -> str:
    """The dotted name of the module in `file`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_at_start(source: str, package: str, known: set[str]) -> set[str]:
    """The modules of `known` that are imported as a module with this source is: not within a
    function, and not for type checkers only."""
    found: set[str] = set()
    bodies = [parsed(source).body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                bodies += [node.body, node.orelse]
            elif isinstance(node, ast.Try):
                bodies += [node.body, node.orelse, node.finalbody]
                bodies += [handler.body for handler in node.handlers]
            elif isinstance(node, ast.With | ast.ClassDef):
                bodies.append(node.body)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for name in imported_modules(ast.unparse(node), package):
                    parent = name.rpartition(".")[0]
                    found |= {name} & known or {parent} & known
    return found


def import_graph() -> dict[str, set[str]]:
    """The modules of the package, and which of them each imports as it is imported itself."""
    known = {module_of(file) for file in FILES}
    return {
        module_of(file): imports_at_start(file.read_text(encoding="utf-8"), package_of(file), known)
        - {module_of(file)}
        for file in FILES
    }


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle, in order; empty if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for used in sorted(graph.get(module, ())):
            if found := search(used, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(graph))), [])


def test_imports_have_no_cycle() -> None:
    graph = import_graph()
    shown = "\n".join(f"{module} -> {', '.join(sorted(graph[module]))}" for module in sorted(graph))
    assert cycle_in(graph) == [], shown


def test_a_cycle_is_found_and_imports_within_functions_make_none() -> None:
    known = {"foldlog.a", "foldlog.b"}
    late = "def f():\n    from foldlog import b\nif TYPE_CHECKING:\n    import foldlog.b"
    assert imports_at_start("from foldlog.b import x", "foldlog", known) == {"foldlog.b"}
    assert imports_at_start("try:\n    from foldlog import b\nfinally: pass", "foldlog", known)
    assert imports_at_start(late, "foldlog", known) == set()
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


FOREIGN_FIELDS = {
    "foldlog/aio/answers.py": {"error._foldlog_outcome"},
    "foldlog/upstreams/nats_connection.py": {"client._ps", "client._connect_command"},
}
"""Notes on objects of other libraries, which have no public place for them."""


def foreign_writes(source: str) -> set[str]:
    """The underscore fields that a module writes of objects other than `self` and `cls`."""
    return {
        ast.unparse(node)
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }


def test_no_module_writes_another_objects_private_fields() -> None:
    found = {
        str(file.relative_to(ROOT)): foreign_writes(file.read_text(encoding="utf-8"))
        for file in FILES
    }
    assert {file: fields for file, fields in found.items() if fields} == FOREIGN_FIELDS


def test_a_write_to_a_private_field_is_found_in_every_spelling() -> None:
    source = (
        "log._x = 1\nlog._y += 1\na, log._z = 1, 2\ndel log._q\nlog._w: int = 1\nself._x = log._r"
    )
    assert foreign_writes(source) == {"log._x", "log._y", "log._z", "log._q", "log._w"}


INSIDES_OF_A_FOLD = {"base", "delta", "runs", "spans", "span_columns"}


def insides_read(source: str) -> list[str]:
    """Reads of what a fold is made of, but not calls of methods of the same name, nor `self`'s own
    fields."""
    tree = parsed(source)
    own = {"spans", "span_columns"}  # methods of the fold
    called = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr not in own
    }
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in INSIDES_OF_A_FOLD
        and id(node) not in called
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]


def test_what_a_fold_is_made_of_is_read_in_its_own_room_only() -> None:
    found = {
        file: insides_read(file.read_text(encoding="utf-8"))
        for file in FILES
        if file.parent != ROOT / "foldlog" / "storage" / "fold"
    }
    assert {file: reads for file, reads in found.items() if reads} == {}


def test_a_read_of_the_insides_of_a_fold_is_found_in_every_spelling() -> None:
    source = """
x = fold.base.entries
y = [*loaded.fold.delta, *snap.snapshot().runs]
for span in fold.spans("", None):
    fold.span_columns(span)
self.base = pieces.delta()
self.base.add_leaf()
"""
    assert sorted(insides_read(source)) == [
        "fold.base",
        "fold.span_columns",
        "fold.spans",
        "loaded.fold.delta",
        "snap.snapshot().runs",
    ]


def test_each_test_is_in_the_directory_of_the_room_that_it_tests() -> None:
    tests = ROOT / "tests"
    rooms = {file.parent.relative_to(tests) for file in tests.rglob("test_*.py")}
    of_no_room = {Path("faults"), Path("project")}
    assert [room for room in sorted(rooms - of_no_room) if not (ROOT / room).is_dir()] == []


def test_each_package_lists_its_modules() -> None:
    for package in sorted({file.parent for file in FILES}):
        contents = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
        named = set(re.findall(r"\b(\w+)(?:\.py\b|/\s)", contents))
        first = set(re.findall(r"(?m)^ *(\w+)(?:\.py\b|/\s)", contents))
        modules = {file.stem for file in package.glob("*.py")} - {"__init__", "__main__"}
        rooms = {room.parent.name for room in package.glob("*/__init__.py")}
        assert modules - named == set(), package
        assert first - modules - rooms == set(), package


def test_importing_foldlog_imports_nothing_that_a_store_does_not_need() -> None:
    program = "import sys, foldlog; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    assert "pykka" in imported
    extras = {"msgspec", "nats", "opentelemetry", "pydantic", "pydantic_core", "rocksdict"}
    for_some_uses = {"asyncio", "click", "rich", "ssl"}
    assert not imported & (extras | for_some_uses)


def test_a_name_that_is_imported_on_first_access_is_there() -> None:
    program = "import foldlog; print(foldlog.LinkState.LIVE, foldlog.LinkStats.__name__, foldlog.aio.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "live LinkStats foldlog.aio\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        foldlog.nothing  # noqa: B018


def test_every_package_of_the_ladder_was_looked_at() -> None:
    assert {rung_of(package_of(file)) for file in FILES} == set(range(len(LADDER)))


def test_every_public_name_is_in_the_page_of_names_with_a_link_to_its_entry_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    names = importlib.import_module("public_names")
    source = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert source.count(names.MARK) == 1
    page = names.filled_in(source, ROOT / "docs")
    listed = re.findall(r"^- \[?`(\w+)`(?:\]\(\S+\))?: \S.*\.$", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(foldlog.__all__)
    assert names.UNDOCUMENTED.keys() == set(re.findall(r"^- `(\w+)`", page, flags=re.MULTILINE))


def test_the_public_names_are_sorted_and_exist() -> None:
    assert list(foldlog.__all__) == sorted(foldlog.__all__)
    assert all(hasattr(foldlog, name) for name in foldlog.__all__)


def default_text(value: object) -> str:
    """A default as a table of options shows it."""
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, int) and value >= 2**20:
        return f"{value // 2**20} MiB"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


@pytest.mark.parametrize("function", [foldlog.open, foldlog.follow])
def test_the_table_of_options_has_every_parameter_with_its_default(
    function: Callable[..., object],
) -> None:
    page = (ROOT / "docs" / "reference" / "stores.md").read_text(encoding="utf-8")
    table = page[: page.index(f"::: foldlog.{function.__name__}")].rpartition("|---|---|---|\n")[2]
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()]
    shown = {
        name: cells[2] for cells in rows if len(cells) > 2 for name in re.findall(r"\w+", cells[1])
    }
    parameters = inspect.signature(function).parameters
    assert list(shown) == list(parameters)
    for name, parameter in parameters.items():
        if name not in ("path", "files", "step"):
            assert shown[name] == default_text(parameter.default), name


def test_the_log_that_the_format_page_dumps_is_the_one_it_describes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    raw = bytearray()
    for block in re.findall(r"^```hex\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            offset, digits = line[:8], line[10:57]
            assert int(offset, 16) == len(raw)
            raw += bytes.fromhex(digits)
    path = tmp_path / "config.log"
    path.write_bytes(raw)

    cursor, log = AppendLogSnapshot.open(path)
    with log:
        assert (cursor, log.report.seq, log.report.sealed) == (WatchCursor.from_u64(4), 2, True)
        assert log.range() == [
            KvEntry("route/a", b"10.0.0.1", VersionToken.from_u64(2)),
            KvEntry("route/b", b"10.0.0.2", VersionToken.from_u64(3)),
        ]


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    file = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE
            )
            slugs = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, target


def block_of_readme(language: str, containing: str) -> str:
    """The one block of code in the README that is in `language` and holds `containing`."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return str(block)


@pytest.mark.parametrize(
    ("containing", "runs", "printed"),
    [
        ("from foldlog import", 2, "None\nbeta/checkout b'1%' b'1%'\nbeta/search b'100%' b'5%'\n"),
        ("settings.log", 1, "b'light' no font ['theme']\n"),
    ],
    ids=["with a stream, twice", "with plain keys"],
)
def test_a_program_in_the_readme_runs(
    containing: str, runs: int, printed: str, tmp_path: Path
) -> None:
    program = block_of_readme("python", containing)
    for _ in range(runs):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert (done.stderr, done.returncode, done.stdout) == ("", 0, printed)


def test_the_commands_in_the_readme_run(tmp_path: Path) -> None:
    commands = block_of_readme("sh", "foldlog apply")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    done = subprocess.run(
        ["sh", "-eu", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "5%" in done.stdout
    assert (tmp_path / "copy.log").exists()


LOCKS = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier"}
LOCKS_OF_CALLERS = {
    "actors/base/answers.py": "for `concurrent.futures.wait`, which expects one; no actor takes it",
    "actors/following/follower.py": "between the threads that wake a follower in a forked child",
    "actors/store/supervisor.py": "pykka's own mark of a stopped actor, replaced after a fork",
    "metrics.py": "between the exporters that collect",
    "testing/crashes.py": "a test double",
    "testing/faults.py": "a test double",
    "testing/steps.py": "a test double",
}


def test_no_actor_can_wait_for_a_lock_that_an_interrupted_caller_left_held():
    """A Ctrl-C within `Condition.__enter__` leaves it held. See `storage/handover.py`."""
    found = {
        str(file.relative_to(ROOT / "foldlog"))
        for file in FILES
        for node in ast.walk(parsed(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in LOCKS
        and isinstance(node.value, ast.Name)
        and node.value.id == "threading"
    }
    assert found == set(LOCKS_OF_CALLERS)
