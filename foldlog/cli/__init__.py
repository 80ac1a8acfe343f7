"""The command `foldlog`. Each module lists its commands in `COMMANDS`; add new modules to
`_MODULES`.

    stream.py   the change stream that `apply` reads: parsing, batching, resuming; pure
    args.py     arguments shared by several commands
    show.py     text, JSON, sizes, progress bars
    read.py     get, range, info, export       read only, take no lock
    write.py    apply, compact, import         hold the writer's lock
    keys.py     put, delete                    write one key, through a store
    convert.py  convert                        write a log in another format, or a database
    inspect.py  verify, salvage                inspect a log that may be damaged; read only
    dump.py     dump                           the same, frame by frame
    database.py the above, for a directory that is a RocksDB database
    top.py      top                            a live view, through a follower
    follow.py   tail, get --follow             print changes as they arrive, through a follower
    mirror.py   mirror                         keep a log in step with an upstream
    demo.py     demo                           the whole life of a log, on the data of unicode.py
    keyboard.py single key presses, for live views

An error prints one line on stderr. Exit codes: 0 success; 1 failure (damage, no such key, disk full
or failing); 2 misuse (bad arguments or input, a file that is missing, already exists or is not
readable, a log open in another writer); 130 Ctrl-C. A closed output pipe, as with `head`, is not an
error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from foldlog.cli import convert, demo, dump, follow, inspect, keys, mirror, read, top, write
from foldlog.cli.show import printable, printable_lines
from foldlog.protocol.errors import FoldlogError, StoreLocked
from foldlog.version import __version__

__all__ = ["exit_code", "main"]

_MODULES = (read, follow, keys, write, mirror, convert, inspect, dump, top, demo)
_MISUSE = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EACCES),
    *(errno.EPERM, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}


def exit_code(error: BaseException) -> int:
    """The exit code for an error: 2 for misuse, 1 for anything else."""
    if isinstance(error, FoldlogError):
        return 2 if isinstance(error, StoreLocked) else 1
    is_misuse = isinstance(error, OSError) and error.errno in _MISUSE
    return 2 if is_misuse or isinstance(error, ValueError) else 1


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return printable(where + error.strerror)
    return printable(str(error) or type(error).__name__)


@contextlib.contextmanager
def _printable_misuse() -> Iterator[None]:
    """Escape what click's messages quote: file names, options, commands."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable_lines(error.message)  # type: ignore[misc]
        raise


_SILENT = logging.NullHandler()


class Cli(click.Group):
    """The group of all commands. Turns their errors into messages and exit codes."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _printable_misuse():
            return super().make_context(*args, **extra)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each command with its whole first sentence; click would truncate it."""
        commands = [
            (name, command)
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(500)) for name, command in commands]
            )

    def invoke(self, ctx: click.Context) -> Any:
        _fill_closed_streams()
        # Commands print warnings themselves, escaped. Without a handler, logging would print them
        # raw.
        logging.getLogger("foldlog").addHandler(_SILENT)
        try:
            with _printable_misuse():
                result = super().invoke(ctx)
            # Here, because an error in the interpreter's own flush at exit cannot be handled.
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except BrokenPipeError:
            _drop_stdout()
            raise click.exceptions.Exit(0) from None
        except (FoldlogError, OSError, ValueError) as error:
            try:
                sys.stdout.flush()
            except (OSError, ValueError):
                _drop_stdout()
            click.echo(f"foldlog: {_message(error)}", err=True)
            raise click.exceptions.Exit(exit_code(error)) from error


def _fill_closed_streams() -> None:
    """Point closed standard streams at /dev/null. Otherwise a log could get the descriptor of
    stderr, and messages would be written into it."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free descriptor: `fd` itself, unless something else took it.
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, os.fdopen(fd, mode))


def _drop_stdout() -> None:
    """Discard buffered output: its reader is gone, or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, sys.stdout.fileno())
        finally:
            os.close(null)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Shell completion: eval "$(_FOLDLOG_COMPLETE=bash_source foldlog)" (or zsh_, fish_).',
)
@click.version_option(__version__, prog_name="foldlog")
def main() -> None:
    """A durable fold of a stream of updates, in one append-only log file.

    Try: foldlog demo
    """


for _module in _MODULES:
    for _command in _module.COMMANDS:
        main.add_command(_command)
