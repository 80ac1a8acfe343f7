"""The command, run in this process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from foldlog.cli import main


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


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
