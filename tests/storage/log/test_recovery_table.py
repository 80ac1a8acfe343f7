"""The table that tells torn from corrupt: total, and wrong in a named way without any one rule."""

from __future__ import annotations

import inspect
import itertools
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling import every, sample

from foldlog.protocol import frames
from foldlog.protocol.frames import FLAG_SYNC_EACH, FRAME_MAGIC, KIND_BATCHES, TRAILER, build_frame
from foldlog.storage.formats.format import Verdict
from foldlog.storage.log import recovery
from foldlog.storage.log.recovery import Evidence, Facts, Rest, gather, judge

BOOLEANS = ["cut_short", "all_zero", "same_boot", "sector_lost", "followed"]
EVIDENCE = [
    None,
    *(Evidence(displaced, durable) for displaced in (False, True) for durable in (False, True)),
]
ALL_FACTS = [
    Facts(evidence=evidence, **dict(zip(BOOLEANS, values, strict=True)))
    for evidence in EVIDENCE
    for values in itertools.product((False, True), repeat=len(BOOLEANS))
]


def expected(facts: Facts) -> Verdict:
    """The rules in other words: the tail is torn if and only if one of four stories explains it."""
    if facts.evidence is not None:
        lost_in_a_power_failure = facts.sector_lost and not facts.same_boot
        return (
            Verdict.TORN
            if lost_in_a_power_failure and facts.evidence == Evidence(False, False)
            else Verdict.CORRUPT
        )
    written_in_part = facts.cut_short
    never_written = facts.all_zero
    last_frame_lost = facts.sector_lost and not facts.same_boot and not facts.followed
    return Verdict.TORN if written_in_part or never_written or last_frame_lost else Verdict.CORRUPT


def test_the_table_judges_every_combination_of_facts():
    assert len(ALL_FACTS) == 5 * 2**5
    for facts in ALL_FACTS:
        verdict, why = judge(facts)
        assert verdict is expected(facts), facts
        assert isinstance(why, str)
        assert why


# Each rule, switched off. A rule that could go without a scenario turning wrong would be no rule.

CLEAN = dict.fromkeys(BOOLEANS, False) | {"evidence": None}
SCENARIOS = {
    "facts.evidence is not None": (
        "a lost sector amid synced frames",
        {"evidence": Evidence(False, True), "sector_lost": True},
        Verdict.CORRUPT,
    ),
    "facts.evidence.displaced": (
        "a hole of zeros between un-synced frames",
        {"evidence": Evidence(True, False), "sector_lost": True},
        Verdict.CORRUPT,
    ),
    "facts.evidence.durable": (
        "a synced frame with a lost sector",
        {"evidence": Evidence(False, True), "sector_lost": True},
        Verdict.CORRUPT,
    ),
    "facts.same_boot": (
        "a hole punched while the machine runs on",
        {"evidence": Evidence(False, False), "sector_lost": True, "same_boot": True},
        Verdict.CORRUPT,
    ),
    "not facts.sector_lost": (
        "a flip amid un-synced frames, found after a reboot",
        {"evidence": Evidence(False, False)},
        Verdict.CORRUPT,
    ),
    "facts.cut_short": (
        "a killed writer",
        {"cut_short": True, "same_boot": True},
        Verdict.TORN,
    ),
    "facts.all_zero": (
        "a file grown before its data was written",
        {"all_zero": True, "same_boot": True},
        Verdict.TORN,
    ),
    "facts.same_boot (the last frame)": (
        "a zeroed sector while the machine runs on",
        {"sector_lost": True, "same_boot": True},
        Verdict.CORRUPT,
    ),
    "facts.followed": (
        "a synced frame with a lost sector and junk behind it",
        {"sector_lost": True, "followed": True},
        Verdict.CORRUPT,
    ),
    "facts.sector_lost": (
        "the last frame lost a sector in a power failure",
        {"sector_lost": True},
        Verdict.TORN,
    ),
}


def without_rule(number: int):
    """`judge`, with its `number`-th condition made never to hold."""
    source = textwrap.dedent(inspect.getsource(judge))
    lines = source.splitlines()
    at = [index for index, line in enumerate(lines) if line.strip().startswith("if ")][number]
    lines[at] = lines[at][: lines[at].index("if ")] + "if False:"
    space = dict(vars(recovery))
    exec("from __future__ import annotations\n" + "\n".join(lines), space)
    return space["judge"], source.splitlines()[at].strip()[3:-1]


def test_every_rule_of_the_table_has_a_scenario():
    conditions = [
        line.strip()
        for line in inspect.getsource(judge).splitlines()
        if line.strip().startswith("if ")
    ]
    assert len(conditions) == len(SCENARIOS), "a rule was added: name a scenario that needs it"


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=list(SCENARIOS))
def test_a_rule_switched_off_makes_its_scenario_wrong(number):
    name = list(SCENARIOS)[number]
    story, facts, right = SCENARIOS[name]
    mutant, condition = without_rule(number)
    assert condition == name.split(" (")[0]
    assert judge(Facts(**CLEAN | facts))[0] is right, story
    assert mutant(Facts(**CLEAN | facts))[0] is not right, story


# The facts.

SEED = 12345


def frame(
    seq: int, offset: int, *, flags: int = 0, synced: int = 0, body: bytes = b"body" * 30
) -> bytes:
    return build_frame(SEED, KIND_BATCHES, body, seq, synced, offset, 7, flags, batches=1)[0]


def damaged(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


class Held:
    """Bytes in memory in place of a file that holds them from `offset` on."""

    fd = -1

    def __init__(self, data: bytes, offset: int) -> None:
        self.files, self.data, self.offset = self, data, offset

    def read(self, size: int, offset: int) -> bytes:
        return self.data[offset - self.offset :][:size]

    def data_after(self, _fd: int, offset: int) -> int:
        return offset

    def hole_after(self, _fd: int, _offset: int) -> int:
        return self.offset + len(self.data)


def rest_of(data: bytes, offset: int = 1000) -> Rest:
    return Rest(Held(data, offset), offset, len(data))


def facts_of(data: bytes, *, same_boot: bool = False) -> Facts:
    return gather(rest_of(data), SEED, last_seq=4, same_boot=same_boot)


def test_a_later_frame_is_evidence_and_an_older_one_is_not():
    bad = damaged(frame(5, 1000), 60)
    end = 1000 + len(bad)
    assert facts_of(bad).evidence is None
    for later, evidence in (
        (frame(6, end), Evidence(displaced=False, durable=False)),
        (frame(6, end + 1), Evidence(displaced=True, durable=False)),
        (frame(6, end, synced=5), Evidence(displaced=False, durable=True)),
        (frame(6, end, synced=4), Evidence(displaced=False, durable=False)),
        (frame(6, end, flags=FLAG_SYNC_EACH), Evidence(displaced=False, durable=True)),
        (frame(3, end), None),
        (frame(4, 60), None),
        (frame(4, end), Evidence(displaced=False, durable=False)),
    ):
        assert facts_of(bad + later).evidence == evidence


def test_evidence_is_sought_behind_a_frame_whose_header_verifies_and_within_one_whose_header_does_not():
    inner = frame(9, 77)
    holder = frame(5, 1000, body=b"x" * 9 + inner)
    assert facts_of(damaged(holder, 50)).evidence is None
    assert facts_of(damaged(holder, 9)).evidence == Evidence(displaced=True, durable=False)


def test_evidence_across_the_edge_of_a_search_window_is_found(monkeypatch):
    monkeypatch.setattr(recovery, "_CHUNK_BYTES", 64)
    bad = damaged(frame(5, 1000), 5)
    for gap in range(70):
        rest = bad + b"\1" * gap + frame(6, 1000 + len(bad) + gap)
        assert facts_of(rest).evidence == Evidence(displaced=False, durable=False), gap


def test_too_many_candidates_count_as_evidence_against(monkeypatch):
    monkeypatch.setattr(recovery, "MAX_CANDIDATES", 10)
    bad = damaged(frame(5, 1000), 5)
    assert facts_of(bad + FRAME_MAGIC * 5).evidence is None
    found = facts_of(bad + FRAME_MAGIC * 50)
    assert found.evidence == Evidence(displaced=True, durable=False)
    assert judge(found)[0] is Verdict.CORRUPT


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 5000))
def test_a_lost_sector_is_found_where_it_lies(start, length, offset):
    data = bytearray(b"\1" * 3000)
    stop = min(start + length, 3000)
    data[start:stop] = bytes(stop - start)
    sectors = {}
    for at, byte in enumerate(data):
        sectors.setdefault((offset + at) // 512, bytearray()).append(byte)
    rest = rest_of(bytes(data), offset)
    assert rest.has_lost(0, 3000) == any(not any(sector) for sector in sectors.values())
    for at in range(0, 3000, 100):
        assert rest.is_lost(at) == (not any(sectors[(offset + at) // 512]))


# What a lost sector explains. The frame stands at byte 1000 and its value holds two sectors of
# zeros.

HOLLOW = b"\1" * 700 + bytes(1600) + b"\2" * 700


def hollow_frame() -> bytes:
    return frame(5, 1000, body=HOLLOW)


@every(7)
def test_a_flip_is_not_explained_by_zeros_that_the_value_holds_itself(every):
    """A batch was synced, and its value held a sector of zeros. After a reboot, each flipped bit of
    it read as a torn tail."""
    raw = hollow_frame()
    for at in sample(range(len(raw)), every):
        flipped = raw[:at] + bytes((raw[at] ^ 1 << at % 8,)) + raw[at + 1 :]
        assert not facts_of(flipped).sector_lost, at


def test_a_byte_that_is_wrong_is_not_explained_either():
    raw = hollow_frame()
    for at in range(0, len(raw), 7):
        wrong = raw[:at] + bytes((raw[at] ^ 0xA5,)) + raw[at + 1 :]
        assert not facts_of(wrong).sector_lost, at


def lose_sector(raw: bytes, number: int) -> bytes:
    start, stop = max(number * 512 - 1000, 0), min((number + 1) * 512 - 1000, len(raw))
    return raw[:start] + bytes(stop - start) + raw[stop:]


@pytest.mark.parametrize("body", [HOLLOW, b"\1" * 3000, bytes(1000) + b"\1" + bytes(1000)])
def test_a_frame_that_lost_a_sector_is_explained_wherever_it_was(body):
    raw = frame(5, 1000, body=body)
    for number in range(1, (1000 + len(raw) - 1) // 512 + 1):
        lost = lose_sector(raw, number)
        if lost != raw:
            assert facts_of(lost).sector_lost, number


def test_zeros_from_any_byte_on_are_explained():
    raw = hollow_frame()
    for at in range(1, len(raw) - 3):
        facts = facts_of(raw[:at] + bytes(len(raw) - at))
        assert judge(facts)[0] is Verdict.TORN, at


def test_a_header_that_is_wrong_is_not_explained_by_a_sector_that_it_does_not_lie_in():
    raw = frame(5, 1000, body=b"\1" * 3000)
    assert facts_of(lose_sector(raw, 4)).sector_lost
    assert not facts_of(lose_sector(damaged(raw, 20), 4)).sector_lost


@pytest.mark.parametrize("size", range(1, 60))
def test_the_beginning_of_a_frame_is_cut_short(size):
    assert facts_of(frame(5, 1000)[:size]).cut_short


@given(st.binary(max_size=200), st.booleans())
def test_gathering_is_total_and_never_calls_junk_torn_on_the_same_boot(rest, same_boot):
    verdict, _ = judge(facts_of(rest, same_boot=same_boot))
    if same_boot and rest and rest[0] not in (0, FRAME_MAGIC[0]):
        assert verdict is Verdict.CORRUPT


def test_a_sound_frames_first_and_last_sectors_are_never_zero():
    # What the shape tests rest on: a lost sector at either end of a frame shows.
    assert 0 not in FRAME_MAGIC
    assert 0 not in TRAILER
    assert FRAME_MAGIC[0] >= 0x80
    assert frames.FRAME_OVERHEAD == 52
