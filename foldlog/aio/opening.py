"""Opening off the loop: a cancelled caller leaves nothing open."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from foldlog.aio.answers import settled
from foldlog.aio.face import Face
from foldlog.aio.off_loop import OffLoop

P = ParamSpec("P")
F = TypeVar("F", bound=Face[Any])


class Opening(Generic[F]):
    """What `open`, `follow` and `mirror` return: use it with `async with`, or await it."""

    def __init__(self, run: Callable[[], Any], face: Callable[[Any, OffLoop], F]) -> None:
        """Not for callers: use `aio.open` or `aio.follow`."""
        self._run, self._face = run, face
        self._opened: F | None = None

    async def _open(self) -> F:
        thread = OffLoop()
        opening = thread.submit(self._run)
        try:
            await settled(opening)
            opened = opening.result()
        except BaseException:
            if not opening.cancel():
                thread.submit(partial(_close_opened, opening))
            thread.end()
            raise
        return self._face(opened, thread)

    def __await__(self) -> Generator[Any, None, F]:
        return self._open().__await__()

    async def __aenter__(self) -> F:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(self, *error: object) -> None:
        if self._opened is not None:
            await self._opened.close()


def _close_opened(opening: Future[Any]) -> None:
    """Close what was opened after its caller had been cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def opener(
    run: Callable[P, Any], face: Callable[[Any, OffLoop], F], doc: str
) -> Callable[P, Opening[F]]:
    def call(*args: P.args, **kwargs: P.kwargs) -> Opening[F]:
        return Opening(lambda: run(*args, **kwargs), face)

    call.__doc__, call.__name__, call.__qualname__ = doc, run.__name__, run.__name__
    return call
