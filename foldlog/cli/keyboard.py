"""Single key presses from a terminal, for live views."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from typing import Any, Self


class Keyboard:
    """The terminal on stdin, unbuffered and without echo while the block runs. Outside of the
    block, or without a terminal, no key is ever pressed."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        import termios
        import tty

        with contextlib.suppress(OSError, ValueError, termios.error):
            fd = sys.stdin.fileno()
            if os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp():
                self._before = termios.tcgetattr(fd)
                tty.setcbreak(fd)
                self._fd = fd
        return self

    def wait_for(self, key: str, timeout_s: float) -> bool:
        """True once `key` is pressed; False after `timeout_s`. Other keys are ignored."""
        deadline = time.monotonic() + timeout_s
        while (rest := deadline - time.monotonic()) > 0:
            if self._fd is None:
                time.sleep(rest)
            elif select.select((self._fd,), (), (), rest)[0]:
                pressed = os.read(self._fd, 1024)
                if key.encode() in pressed:
                    return True
                if not pressed:  # the terminal is gone
                    self._fd = None
        return False

    def __exit__(self, *error: object) -> None:
        import termios

        if self._before:
            with contextlib.suppress(OSError, ValueError, termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
