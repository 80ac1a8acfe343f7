"""Messages that the actors of one store send each other, and nobody else sends.

Each has `fail`, called if the store ends before it is served: none is lost without a word, and
none is reported as a user's would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from foldlog.actors.store.requests import ExportRequest
from foldlog.protocol.engine import Compaction, Export, Snapshot


class CompactJob(NamedTuple):
    """The writer asks for the next pass of a compaction: the fold, or what came meanwhile.
    Maintenance replies with `Rewritten`."""

    rewrite: Compaction

    def fail(self, error: Exception | None) -> None:
        """It will not be served."""
        self.rewrite.cancelled = True
        self.rewrite.discard()


class ExportJob(NamedTuple):
    """The writer asks for an export that it has prepared. The answer goes to the request's
    future."""

    request: ExportRequest
    export: Export

    def fail(self, error: Exception | None) -> None:
        """It will not be served."""
        self.request.fail(error)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """To the writer: a pass of a compaction is done or has failed."""

    urgent: ClassVar[bool] = True

    rewrite: Compaction
    error: Exception | None

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to finish it."""
        self.rewrite.discard()


class LetGo(NamedTuple):
    """The writer no longer needs these folds: freeing them takes long, and must delay nobody."""

    folds: list[Snapshot]
    """Emptied by maintenance."""

    def fail(self, error: Exception | None) -> None:
        """They are freed with this message."""


@dataclass(frozen=True, slots=True)
class Heal:
    """To the writer: a background fsync failed, so the fold must be written to a new file."""

    urgent: ClassVar[bool] = True

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to do it: the next process to open the log will."""


@dataclass(frozen=True, slots=True)
class CheckFile:
    """To the writer: the log's file seems to have been changed by another program."""

    urgent: ClassVar[bool] = True

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to check."""


class Look:
    """To the syncer: something happened to the name of the log."""

    __slots__ = ()

    def fail(self, error: Exception | None) -> None:
        """Nobody is left to look."""
