"""Messages that the actors of one store send each other, and nobody else sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foldlog.actors.store.requests import ExportRequest
from foldlog.protocol.engine import Compaction, Export, Snapshot


class Internal:
    """Gets into a full mailbox. None is lost without a word, and none is reported as a user's
    would be."""

    __slots__ = ()
    urgent: ClassVar[bool] = True

    def fail(self, error: Exception | None) -> None:
        """The store has ended before it was served. By default, nobody is left whom it would
        serve."""


@dataclass(frozen=True, slots=True)
class CompactJob(Internal):
    """The writer asks for the next pass of a compaction: the fold, or what came meanwhile.
    Maintenance replies with `Rewritten`."""

    rewrite: Compaction

    def fail(self, error: Exception | None) -> None:
        self.rewrite.cancelled = True
        self.rewrite.discard()


@dataclass(frozen=True, slots=True)
class ExportJob(Internal):
    """The writer asks for an export that it has prepared. The answer goes to the request's
    future."""

    request: ExportRequest
    export: Export

    def fail(self, error: Exception | None) -> None:
        self.request.fail(error)


@dataclass(frozen=True, slots=True)
class Rewritten(Internal):
    """To the writer: a pass of a compaction is done or has failed."""

    rewrite: Compaction
    error: Exception | None

    def fail(self, error: Exception | None) -> None:
        self.rewrite.discard()


@dataclass(frozen=True, slots=True)
class LetGo(Internal):
    """The writer no longer needs these folds: freeing them takes long, and must delay nobody."""

    folds: list[Snapshot]
    """Emptied by maintenance; freed with this message if it is not served."""


class Heal(Internal):
    """To the writer: a background fsync failed, so the fold must be written to a new file. If it
    is not served, the next process to open the log does that."""


class CheckFile(Internal):
    """To the writer: the log's file seems to have been changed by another program."""


class Look(Internal):
    """To the syncer: something happened to the name of the log."""
