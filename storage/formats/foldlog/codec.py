"""Encodes what a writer appends to a log in foldlog's own format.

These are commit groups, and the frames that begin and end a session.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgpack

from foldlog.protocol.frames import (
    FLAG_ORIGIN,
    FLAG_SYNC_EACH,
    KIND_BATCHES,
    KIND_OPEN,
    KIND_SEAL,
    FileHeader,
    build_frame,
)
from foldlog.protocol.updates import batches_body, has_origin
from foldlog.storage.log.scan import Chain
from foldlog.storage.log.sidecars.note import boot_id

WRITER = "foldlog 1"
_new = tuple.__new__  # a NamedTuple in half the time


class FrameCodec:
    """Encodes appends as frames. See `formats.format.Codec`."""

    def __init__(self, header: FileHeader, *, sync_each: bool) -> None:
        self._seed = header.seed
        self._flags = FLAG_SYNC_EACH if sync_each else 0

    def group(self, items: Sequence[bytes], chain: Chain, synced_seq: int) -> tuple[bytes, Chain]:
        # What `Chain.next_frame` does, without a call that each append would pay for.
        offset, link, seq, _ = chain
        if synced_seq > seq:
            synced_seq = seq
        batches = len(items)
        seq += batches
        flags = self._flags
        if has_origin(items[0]) or (batches > 1 and any(map(has_origin, items))):
            flags |= FLAG_ORIGIN
        body = batches_body(items)
        frame, link = build_frame(
            self._seed, KIND_BATCHES, body, seq, synced_seq, offset, link, flags, batches
        )
        return frame, _new(Chain, (offset + len(frame), link, seq, synced_seq))

    def opening(self, chain: Chain, synced_seq: int) -> tuple[bytes, Chain]:
        return chain.next_frame(self._seed, KIND_OPEN, open_body(), synced_seq, self._flags)

    def seal(self, chain: Chain, synced_seq: int) -> tuple[bytes, Chain]:
        return chain.next_frame(self._seed, KIND_SEAL, b"", synced_seq, self._flags)


def open_body() -> bytes:
    """The body of an OPEN frame.

    Its nonce makes the chain of each session unique, even in copies of one log.
    """
    packed: bytes = msgpack.packb(
        {"boot": boot_id(), "nonce": secrets.token_bytes(8), "writer": WRITER}
    )
    return packed
