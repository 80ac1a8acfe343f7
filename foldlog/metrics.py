"""The statistics of stores and followers as OpenTelemetry instruments. Needs the extra `otel`
(opentelemetry-api).

`observe` registers a store under a name; from then on, each collection by the program's meter
provider reads its statistics. This adds no work to the write path: the instruments read what
`stats()` and the store's histograms hold anyway. A store that is closed or dropped is no longer
reported.

Every measurement carries `foldlog.name`, the name given to `observe`. `docs/how-to/production.md`
says what to alert on.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from foldlog.actors.following.follower import FollowerState
from foldlog.actors.store.core import State, Stats
from foldlog.actors.store.histogram import GROUP_BOUNDS, LATENCY_BOUNDS_S, Histogram
from foldlog.follow import Follower, FollowerStats
from foldlog.health import Status
from foldlog.protocol.errors import FoldlogError
from foldlog.store import Store
from foldlog.version import __version__

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

NAME = "foldlog.name"
"""The attribute that tells stores apart."""

Observed: TypeAlias = Store | Follower
Reading: TypeAlias = Iterable[tuple[float, dict[str, str]]]


class MetricNameTaken(FoldlogError, ValueError):
    """`observe` was given a name that another open store is observed under."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"a store is already observed under the name {self.name!r}"


class _Instrument(NamedTuple):
    kind: str
    unit: str
    description: str
    read: str | Callable[[Any, Any], Reading]
    """A field of the statistics; or (store or follower, its stats) -> measurements: values, with
    any attributes beyond the name."""

    def measure(self, observed: Observed, stats: Stats | FollowerStats) -> Reading:
        if isinstance(self.read, str):
            return ((getattr(stats, self.read), {}),)
        return self.read(observed, stats)


def _states(kind: type[State] | type[FollowerState]) -> Callable[[Any, Any], Reading]:
    return lambda _, stats: ((int(stats.state is state), {"state": state.value}) for state in kind)


def _health(observed: Observed, _: object) -> Reading:
    status = observed.health().status
    return ((int(status is each), {"status": each.value}) for each in Status)


def _synced_lag(_: Store, stats: Stats) -> Reading:
    return ((max(stats.seq - stats.synced_seq, 0), {}),)


def _compaction_duration(_: Store, stats: Stats) -> Reading:
    return ((stats.last_compaction_s or 0.0, {}),)


def _restarts(store: Store, _: Stats) -> Reading:
    counts = store._core.statistics.restarts_by_cause
    return (
        (count, {"foldlog.actor": actor, "error.type": error})
        for (actor, error), count in counts.items()
    )


def _log_size(_: Store, stats: Stats) -> Reading:
    return (
        (stats.base_bytes, {"foldlog.log.part": "base"}),
        (stats.appended_bytes, {"foldlog.log.part": "appended"}),
    )


def _backlog(observed: Observed, _: object) -> Reading:
    return ((max(observed._feeds.backlog, default=0), {}),)


_gauge, _counter, _updown = (
    functools.partial(_Instrument, kind) for kind in ("gauge", "counter", "updown")
)
STORE_INSTRUMENTS = {
    "foldlog.store.state": _updown(
        "1", "1 for the state the store is in, 0 for the others.", _states(State)
    ),
    "foldlog.store.health": _updown(
        "1", "1 for the store's health status, 0 for the others.", _health
    ),
    "foldlog.store.sequence": _gauge("{batch}", "The sequence of the last batch.", "seq"),
    "foldlog.store.synced.lag": _gauge(
        "{batch}", "Batches that a power loss could lose.", _synced_lag
    ),
    "foldlog.store.synced.delay": _gauge(
        "s", "Time that the oldest of these has waited to be synced.", "unsynced_s"
    ),
    "foldlog.store.batches": _counter("{batch}", "Batches written.", "batches"),
    "foldlog.store.groups": _counter(
        "{group}", "Commit groups written: one write to the log each.", "groups"
    ),
    "foldlog.store.mailbox.depth": _updown(
        "{request}", "Requests waiting for the writer.", "mailbox_depth"
    ),
    "foldlog.store.restarts": _counter(
        "{restart}", "Restarts of the store's actors, by actor and type of error.", _restarts
    ),
    "foldlog.store.compactions": _counter("{compaction}", "Compactions finished.", "compactions"),
    "foldlog.store.compaction.duration": _gauge(
        "s", "Duration of the last compaction; 0 before the first.", _compaction_duration
    ),
    "foldlog.store.throttled.time": _counter(
        "s", "Time that writes were slowed down to let a compaction catch up.", "throttled_s"
    ),
    "foldlog.store.log.size": _updown(
        "By",
        "Size of the log: the base, live at the last compaction, and the bytes appended since, "
        "which a compaction may free.",
        _log_size,
    ),
    "foldlog.store.entries": _updown("{entry}", "Live entries.", "entries"),
    "foldlog.store.snapshot.age": _gauge(
        "s", "Time since the last batch was published.", "snapshot_age_s"
    ),
    "foldlog.store.cache.size": _updown(
        "By", "Memory for what was read from disk.", "cached_bytes"
    ),
    "foldlog.store.subscriptions": _updown(
        "{subscription}", "Watches, deliveries and derived states.", "subscriptions"
    ),
    "foldlog.store.subscription.backlog": _gauge(
        "{group}", "Commit groups waiting for the slowest subscriber.", _backlog
    ),
}
FOLLOWER_INSTRUMENTS = {
    "foldlog.follower.state": _updown(
        "1", "1 for the state the follower is in, 0 for the others.", _states(FollowerState)
    ),
    "foldlog.follower.health": _updown(
        "1", "1 for the follower's health status, 0 for the others.", _health
    ),
    "foldlog.follower.sequence": _gauge("{batch}", "The sequence of the last batch seen.", "seq"),
    "foldlog.follower.delay": _gauge(
        "s", "Time from the write of the last batch until it was seen.", "delay_s"
    ),
    "foldlog.follower.snapshot.age": _gauge(
        "s", "Time since the last batch was seen.", "snapshot_age_s"
    ),
    "foldlog.follower.reloads": _counter("{reload}", "Reloads of the log.", "reloads"),
    "foldlog.follower.entries": _updown("{entry}", "Live entries.", "entries"),
    "foldlog.follower.subscription.backlog": _gauge(
        "{group}", "Commit groups waiting for the slowest subscriber.", _backlog
    ),
}


class _Reported:
    """How much of a store's histogram has been reported. OpenTelemetry's histograms take values,
    not counts."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._counts, self._sums = [0] * len(histogram.counts), [0.0] * len(histogram.counts)

    def news(self) -> Iterator[tuple[float, int]]:
        """(mean, count) of each bucket's new values since the last call. Buckets and sums stay
        exact."""
        counts, sums = list(self._histogram.counts), list(self._histogram.sums)
        for bucket, count in enumerate(counts):
            new = count - self._counts[bucket]
            if new > 0:
                yield (sums[bucket] - self._sums[bucket]) / new, new
        self._counts, self._sums = counts, sums


class _Meters:
    """The instruments of one meter provider, and the stores they report."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("foldlog", __version__)
        self.observed: dict[str, weakref.ref[Observed]] = {}
        self._reported: dict[str, tuple[_Reported, _Reported]] = {}
        self._lock = threading.Lock()
        self._latency = meter.create_histogram(
            "foldlog.store.apply.duration",
            "s",
            "Time from a call to its answer, for each batch.",
            explicit_bucket_boundaries_advisory=LATENCY_BOUNDS_S,
        )
        self._group_size = meter.create_histogram(
            "foldlog.store.group.size",
            "{batch}",
            "Batches in a commit group.",
            explicit_bucket_boundaries_advisory=GROUP_BOUNDS,
        )
        create = {
            "gauge": meter.create_observable_gauge,
            "counter": meter.create_observable_counter,
            "updown": meter.create_observable_up_down_counter,
        }
        for kind, table in ((Store, STORE_INSTRUMENTS), (Follower, FOLLOWER_INSTRUMENTS)):
            for name, instrument in table.items():
                callback = self._callback(name, instrument, kind)
                create[instrument.kind](name, [callback], instrument.unit, instrument.description)

    def add(self, observed: Observed, name: str) -> None:
        with self._lock:
            other = self.observed.get(name)
            if other is not None and (there := other()) is not None and not _is_closed(there):
                raise MetricNameTaken(name)
            self.observed[name] = weakref.ref(observed)
            if isinstance(observed, Store):
                statistics = observed._core.statistics
                self._reported[name] = (
                    _Reported(statistics.latency),
                    _Reported(statistics.group_size),
                )

    def remove(self, observed: Observed, name: str) -> None:
        with self._lock:
            found = self.observed.get(name)
            if found is not None and found() is observed:
                del self.observed[name]
                self._reported.pop(name, None)

    def _live(self, kind: type[Observed]) -> Iterator[tuple[str, Any]]:
        for name, found in list(self.observed.items()):
            observed = found()
            if isinstance(observed, kind):
                yield name, observed

    def _callback(
        self, metric: str, instrument: _Instrument, kind: type[Observed]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        from opentelemetry.metrics import Observation

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for name, observed in self._live(kind):
                try:
                    stats: Stats | FollowerStats = observed.stats()
                except FoldlogError:
                    continue  # it was closed
                for value, attributes in instrument.measure(observed, stats):
                    yield Observation(value, {NAME: name, **attributes})
            if metric == "foldlog.store.batches":
                self._report_histograms()

        return observe

    def _report_histograms(self) -> None:
        with self._lock:
            for name, reported in self._reported.items():
                for histogram, news in zip(
                    (self._latency, self._group_size), reported, strict=True
                ):
                    for value, count in news.news():
                        for _ in range(count):
                            histogram.record(value, {NAME: name})


def _is_closed(observed: Observed) -> bool:
    return observed.state in (State.CLOSED, FollowerState.CLOSED)


_meters: weakref.WeakKeyDictionary[MeterProvider, _Meters] = weakref.WeakKeyDictionary()
_meters_lock = threading.Lock()


class Observing:
    """What `observe` returns. Observation ends with `stop`, or with the store."""

    def __init__(self, meters: _Meters, observed: Observed, name: str) -> None:
        """Not for callers: use `observe`."""
        self._meters, self._observed, self.name = meters, weakref.ref(observed), name

    def stop(self) -> None:
        """Stop reporting it. Stopping twice is fine."""
        observed = self._observed()
        if observed is not None:
            self._meters.remove(observed, self.name)


def observe(
    store: Observed, name: str | None = None, *, meter_provider: MeterProvider | None = None
) -> Observing:
    """Report `store`, which may be a follower, to OpenTelemetry under `name`; the default is its
    file name.

    MetricNameTaken if another open store has that name; ImportError without the extra `otel`. Does
    not keep the store alive.
    """
    if not isinstance(store, (Store, Follower)):
        raise TypeError(f"observe takes a store or a follower, not a {type(store).__name__}")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"a name is a str, not {type(name).__name__}")
    if name is None:
        name = store.path.name
    try:
        from opentelemetry.metrics import get_meter_provider
    except ImportError as error:
        raise ImportError(f"foldlog.metrics needs the extra otel: {error}") from error
    provider = meter_provider or get_meter_provider()
    with _meters_lock:
        meters = _meters.get(provider)
        if meters is None:
            meters = _meters[provider] = _Meters(provider)
    meters.add(store, name)
    return Observing(meters, store, name)
