"""The library's logger. A log handler of the program that fails ends no thread of the library."""

from __future__ import annotations

import logging
import threading
from typing import Any

from foldlog.protocol.errors import is_from_system


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Write a line. What the program's handlers and filters raise is dropped; but on the main
        thread only an error of the system is: anything else may come from a signal handler."""
        try:
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except BaseException as error:
            if threading.current_thread() is threading.main_thread() and not is_from_system(error):
                raise


log = _Logger(logging.getLogger("foldlog"), {})
