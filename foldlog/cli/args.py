"""Arguments and options shared by several commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from foldlog.cli.show import printable
from foldlog.protocol.options import FORMAT, ON_DAMAGE

_F = TypeVar("_F", bound=Callable[..., Any])


def log_argument(command: _F) -> _F:
    """The argument LOG, the first of most commands."""
    return click.argument("log", type=click.Path(path_type=Path))(command)


def format_option(
    help: str, name: str = "--format", *, required: bool = False
) -> Callable[[_F], _F]:
    """An option whose value, the name of a file format, is passed as `format_name`."""
    return click.option(
        name, "format_name", type=click.Choice(FORMAT.words), required=required, help=help
    )


def json_option(help: str = "Print one JSON object.") -> Callable[[_F], _F]:
    """The option --json, which is passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def checked(parse: Callable[[Any], Any]) -> Callable[..., Any]:
    """The callback of an option: passes on what `parse` makes of the value, if one was given."""

    def check(_context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(printable(str(error)), param=parameter) from None

    return check


def on_damage_option(command: _F) -> _F:
    """The option --on-damage, for commands that open a log for writing."""
    return click.option(
        "--on-damage",
        type=click.Choice(ON_DAMAGE.words),
        default=ON_DAMAGE.default,
        show_default=True,
        help="If LOG is damaged: refuse it, or cut it at the first damage and keep the rest in a "
        "file next to it.",
    )(command)


def utf8(_context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse a key that cannot be stored, before anything is opened."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("is not UTF-8", param=parameter) from None
    return value
