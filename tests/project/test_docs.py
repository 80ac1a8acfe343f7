"""The tutorial and the guides: every block of code is run, and prints what the page says.

    ```python                       runs in the page's session
    ```python title="feed.py"       is saved under that name
    ```sh                           runs in the page's folder
    ```text title="prints"          what the block before it prints; `...` stands for anything
    ```console                      is for the reader's machine, and not run

All blocks of a page share a folder, which is empty at first, and a session in a process of its own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
KINDS = {"python", "sh", "text", "console"}
BLOCK_TIMEOUT_S = 120

SESSION = """
import json, os, sys
answers = int(sys.argv[1])
names = {"__name__": "__main__"}
sys.path.insert(0, "")
for line in sys.stdin:
    where, code = json.loads(line)
    exec(compile(code, where, "exec"), names)
    sys.stdout.flush()
    os.write(answers, b"done\\n")
"""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text.count("\n", 0, match.start()) + 2, match[1], match[2] or "", match[3])
        for match in FENCE.finditer(text)
    ]


class Reader:
    """Somebody who types in what a page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed = folder.parent / "printed"
        self.seen = 0
        path = os.pathsep.join(
            (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
        )
        self.env = {
            **os.environ,
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "error",
            "COLUMNS": "200",
        }
        self.env.pop("PYTHONPATH", None)
        self._answers, theirs = os.pipe()
        self._out = self.printed.open("ab")
        self.session = subprocess.Popen(
            (sys.executable, "-c", SESSION, str(theirs)),
            cwd=folder,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=subprocess.PIPE,
            pass_fds=(theirs,),
        )
        os.close(theirs)

    def run(self, block: Block) -> None:
        if block.language == "python" and block.title:
            ast.parse(block.text)
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self._in_session(block)
        elif block.language == "sh":
            done = subprocess.run(
                ("sh", "-eu", "-c", block.text),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=subprocess.PIPE,
                timeout=BLOCK_TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, (
                f"{block} ended with {done.returncode}: {done.stderr.decode()}"
            )

    def _in_session(self, block: Block) -> None:
        assert self.session.stdin is not None
        assert self.session.stderr is not None
        self.session.stdin.write(json.dumps([str(block), block.text]).encode() + b"\n")
        self.session.stdin.flush()
        if os.read(self._answers, 100) != b"done\n":
            pytest.fail(f"{block} failed:\n{self.session.stderr.read().decode()}")

    def new_output(self) -> str:
        """What was printed since the last call."""
        text = self.printed.read_bytes()[self.seen :].decode()
        self.seen += len(text.encode())
        return text

    def leave(self) -> str:
        """End the session as the end of a program does. What it complains about."""
        _, err = self.session.communicate(timeout=BLOCK_TIMEOUT_S)
        self._out.close()
        os.close(self._answers)
        return err.decode()


def matches(expected: str, printed: str) -> bool:
    """True if `printed` is what the page says. Trailing white space is ignored on either side."""
    pattern = ".*".join(map(re.escape, expected.rstrip().split("...")))
    return re.fullmatch(pattern, printed.rstrip(), flags=re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    reader = Reader(folder)
    try:
        for block in blocks_of(page):
            if block.language in ("python", "sh"):
                reader.new_output()
                reader.run(block)
            elif block.title == "prints":
                printed = reader.new_output()
                assert matches(block.text, printed), (
                    f"{block} says:\n{block.text}\nand this was printed:\n{printed}"
                )
    finally:
        complaints = reader.leave()
    assert not re.search("Traceback|Warning", complaints), (
        complaints
    )  # what foldlog logs is no complaint


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_code_and_no_block_that_no_rule_covers(page: Path) -> None:
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= KINDS
    assert any(block.language == "python" for block in blocks)
    fences = re.findall(r"^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(fences) == 2 * len(blocks), "a fence that is not read"


def test_a_block_that_prints_something_else_is_noticed() -> None:
    assert matches("a ... c\n", "a b c\n")
    assert matches("a\n", "a")
    assert not matches("a ... c\n", "a b d\n")
    assert not matches("a\n", "a\nb\n")


@pytest.mark.parametrize(
    "page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS))
)
def test_every_page_is_in_the_navigation_and_every_link_between_pages_leads_somewhere(
    page: Path,
) -> None:
    assert f": {page.relative_to(DOCS)}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), f"{page.name}: {target}"


def test_the_navigation_names_only_pages_that_exist() -> None:
    for name in re.findall(
        r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        assert (DOCS / name).exists(), name


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_prose_fits_100_columns_and_code_76(page: Path) -> None:
    language = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            language = None if language is not None else line
            continue
        if language is None and not line.startswith("|"):  # a row of a table is one line
            assert len(line) <= 100, f"{page.name}:{number}"
        elif language not in (None, "```hex"):  # 16 bytes a line
            assert len(line) <= 76, f"{page.name}:{number}"
