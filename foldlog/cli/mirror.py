"""`foldlog mirror` keeps a log in step with an upstream until it is stopped."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path

import click

import foldlog
from foldlog.cli.args import json_option
from foldlog.cli.show import printable
from foldlog.protocol.upstream import ResetHeld
from foldlog.storage.handover import Latch
from foldlog.upstreams import from_url

LINE_S = 1.0
_PASSWORD_CHARS = 4096


@click.command(
    epilog="""\b
Examples:
  foldlog mirror copy.log nats://127.0.0.1:4222/routes
  foldlog mirror copy.log etcd://127.0.0.1:2379/routes/ --once
  foldlog mirror copy.log routes.log --prefix eu/"""
)
@click.argument("log", type=click.Path(path_type=Path))
@click.argument("upstream")
@click.option("--prefix", multiple=True, help="Only keys that start with this; may be repeated.")
@click.option("--once", is_flag=True, help="Exit once LOG matches the upstream: for cron.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="With --once: the longest time to wait, in seconds.",
)
@click.option("--user", help="User name for the upstream.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file whose first line is the password.",
)
@click.option(
    "--credentials", type=click.Path(exists=True, dir_okay=False), help="A NATS credentials file."
)
@click.option("--domain", help="The JetStream domain.")
@click.option("--skip-oversize", is_flag=True, help="Skip entries that are over the limits.")
@click.option("--accept-reset", is_flag=True, help="Allow one reset to delete most of the keys.")
@click.option("--quiet", is_flag=True, help="Print no status.")
@json_option("Print the status to stdout, as one JSON object per line.")
def mirror(
    log: Path,
    upstream: str,
    prefix: tuple[str, ...],
    once: bool,
    timeout_s: float,
    user: str | None,
    password_file: Path | None,
    credentials: str | None,
    domain: str | None,
    skip_oversize: bool,
    accept_reset: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Keep LOG an exact copy of UPSTREAM, and report the status on stderr.

    UPSTREAM is nats://HOST:PORT/BUCKET, etcd://HOST:PORT/PREFIX, or the path of another log.
    Deletes are copied as well. Runs until Ctrl-C or SIGTERM. Exit code 1 if the upstream refuses
    the connection, or if a reset needs --accept-reset.
    """
    options = {
        "user": user,
        "password": _password(password_file) if password_file else None,
        "credentials": credentials,
        "domain": domain,
    }
    try:
        source = from_url(upstream, **{name: v for name, v in options.items() if v is not None})
    except TypeError as error:  # an option of another kind of upstream
        raise click.UsageError(str(error)) from None
    logging.getLogger("foldlog").addHandler(logging.NullHandler())  # printed here, as single lines
    stop = Latch()  # can be set from a signal handler
    if threading.current_thread() is threading.main_thread():
        stopped = signal.default_int_handler if once else lambda number, frame: stop.set()
        signal.signal(signal.SIGTERM, stopped)
    with foldlog.mirror(
        log, source, prefix=prefix or "", on_oversize="skip" if skip_oversize else "fail"
    ) as copy:
        if once:
            _sync_once(copy, timeout_s, accept_reset)
            _report(copy, 0.0, as_json)
            return
        _watch(copy, stop, accept_reset, quiet, as_json)


def _password(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(_PASSWORD_CHARS + 1).rstrip("\r\n")
    except UnicodeDecodeError:  # which would show a part of it
        raise click.BadParameter("it is not UTF-8", param_hint="--password-file") from None
    if not line:
        raise click.BadParameter("its first line is empty", param_hint="--password-file")
    if len(line) > _PASSWORD_CHARS:
        raise click.BadParameter(
            f"its first line is longer than {_PASSWORD_CHARS} characters",
            param_hint="--password-file",
        )
    return line


def _sync_once(copy: foldlog.Mirror, timeout_s: float, accept_reset: bool) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        copy.wait_synced(timeout_s)
    except ResetHeld:
        if not accept_reset:
            raise
        copy.accept_reset()
        copy.wait_synced(max(deadline - time.monotonic(), 0.0))


def _watch(
    copy: foldlog.Mirror, stop: Latch, accept_reset: bool, quiet: bool, as_json: bool
) -> None:
    """Print the status: each second on a terminal, otherwise at each change of state."""
    live = sys.stderr.isatty() and not quiet and not as_json
    printed, updates, at = "", 0, time.monotonic()
    while not stop.wait(LINE_S if live else LINE_S / 4):
        link, now = copy.link, time.monotonic()
        if link.state is foldlog.LinkState.FAILED:
            if not (accept_reset and isinstance(link.error, ResetHeld)):
                raise link.error or foldlog.FoldlogError(link.reason)
            accept_reset = False
            copy.accept_reset()
        rate = (link.updates - updates) / (now - at)
        updates, at = link.updates, now
        state = f"{link.state}: {link.reason}"
        if live:
            click.echo(f"\r\x1b[K{_line(copy, rate)}", nl=False, err=True)
        elif state != printed and not quiet:
            _report(copy, rate, as_json)
        printed = state
    if live:
        click.echo(err=True)


def _report(copy: foldlog.Mirror, rate: float, as_json: bool) -> None:
    if not as_json:
        click.echo(_line(copy, rate), err=True)
        return
    link = copy.link
    figures = {
        "state": str(link.state),
        "reason": link.reason,
        "keys": len(copy),
        "updates_per_s": round(rate),
        "lag": copy.lag(),
    }
    click.echo(json.dumps(figures))


def _line(copy: foldlog.Mirror, rate: float) -> str:
    link = copy.link
    lag = "unknown" if copy.lag() is None else str(copy.lag())
    reason = f" ({printable(link.reason)})" if link.reason else ""
    return f"{link.state}{reason}, {len(copy)} keys, {rate:.0f} updates/s, lag {lag}"


COMMANDS = (mirror,)
