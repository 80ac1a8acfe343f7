"""The command `foldlog`. Each module lists its commands in `COMMANDS`; a new module joins by adding a row to `_MODULES`.

    stream.py   the change stream of `apply`: parsing, batching, resuming; pure
    args.py     arguments that several commands take
    show.py     text, JSON, sizes, progress bars
    read.py     get, range, info, export       change nothing, lock nothing
    write.py    apply, compact, import         hold the writer's lock
    keys.py     put, delete                    one key, by a store
    convert.py  convert                        a log of one file format as a log of the other
    inspect.py  verify, salvage                look at a log that may be damaged, and only look
    dump.py     dump                           the same, part by part
    top.py      top                            a live view, through a follower
    follow.py   tail, get --follow             changes as they come, through a follower
    mirror.py   mirror                         keep a log a copy of an upstream
    demo.py     demo                           the whole life of a log, on real data

Errors end in one line on stderr. Exit codes: 0 fine; 1 the store says no (damage, no such key, a full or failing disk);
2 misuse (bad arguments or input, a file that is missing, exists or may not be read, a log that another process writes);
130 Ctrl-C. A reader of the output that leaves, as `head` does, is no error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from typing import Any

import click

from foldlog.cli import convert, demo, dump, follow, inspect, keys, mirror, read, top, write
from foldlog.cli.show import printable
from foldlog.protocol.errors import FoldlogError, StoreLocked
from foldlog.version import __version__

__all__ = ["exit_code", "main"]

_MODULES = (read, follow, keys, write, mirror, convert, inspect, dump, top, demo)
_MISUSE = {
    *(
        errno.ENOENT,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.EACCES,
        errno.EPERM,
    ),
    *(errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
}


def exit_code(error: BaseException) -> int:
    """The exit code for an error: 1 if the store or the disk says no, 2 if the command was called wrongly."""
    if isinstance(error, StoreLocked):
        return 2
    if isinstance(error, FoldlogError):
        return 1
    return (
        2
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in _MISUSE)
        else 1
    )


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return printable(where + error.strerror)
    return printable(str(error) or type(error).__name__)


_UNTOLD = logging.NullHandler()


class Cli(click.Group):
    """The group of all commands, which turns their errors into exit codes."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each command with its whole first sentence, which click would cut short."""
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
        # Warnings are told by the commands, escaped; without a handler, logging would print them as they are.
        logging.getLogger("foldlog").addHandler(_UNTOLD)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, for the interpreter's own flush could only complain
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
    """Let closed standard streams lead nowhere: else a log would get the descriptor of stderr, and what is written there."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(
                os.devnull, os.O_RDWR
            )  # the lowest free one, which is `fd` itself, unless something took that
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, os.fdopen(fd, mode))


def _drop_stdout() -> None:
    """Send what is still buffered for a reader that is gone (or a disk that is full) nowhere."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, sys.stdout.fileno())
        finally:
            os.close(null)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Completion of commands and files: eval "$(_FOLDLOG_COMPLETE=bash_source foldlog)" (or zsh_, fish_).',
)
@click.version_option(__version__, prog_name="foldlog")
def main() -> None:
    """A durable fold of a stream of updates, in one append-only log file.

    Try: foldlog demo
    """


for _module in _MODULES:
    for _command in _module.COMMANDS:
        main.add_command(_command)
