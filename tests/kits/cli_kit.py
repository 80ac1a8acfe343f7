"""The command, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from foldlog.cli import main

COMMAND = (sys.executable, "-c", "from foldlog.cli import main; main()")
"""The command, for a process of its own."""


def run(*args: object, stdin: object = None) -> Result:
    """Run the command in this process; an exception that is no exit is a failure of the test."""
    result = CliRunner().invoke(
        main,
        [str(arg) for arg in args],
        input=stdin,  # type: ignore[arg-type]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(*args: object, stdin: object = None) -> Any:
    """What the command prints with --json, parsed."""
    return json.loads(run(*args, "--json", stdin=stdin).stdout)


def told_by_line(*args: object) -> list[Any]:
    """What a command prints with --json that prints an object a line."""
    return list(map(json.loads, run(*args, "--json").stdout.splitlines()))


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
