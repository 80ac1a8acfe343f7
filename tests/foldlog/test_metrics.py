"""The figures of stores as OpenTelemetry instruments, scraped as Prometheus scrapes them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from actor_kit import until

import foldlog
from foldlog import Put
from foldlog.testing import crash_at

pytest.importorskip("opentelemetry.sdk.metrics")
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, start_http_server

from foldlog import metrics

ON_EACH_ENGINE = True

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana-dashboard.json"


class Collected:
    """A meter provider, and what one collection of it says."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def values(self, metric: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        found: dict[tuple[tuple[str, Any], ...], Any] = {}
        data = self.reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for each in scope.metrics:
                    if each.name == metric:
                        for point in each.data.data_points:
                            found[tuple(sorted(point.attributes.items()))] = point
        return found

    def value(self, metric: str, **attributes: str) -> float:
        for labels, point in self.values(metric).items():
            if attributes.items() <= dict(labels).items():
                return float(point.value)
        raise LookupError(metric, attributes)


@pytest.fixture
def collected() -> Iterator[Collected]:
    collected = Collected()
    yield collected
    collected.provider.shutdown()


def test_the_figures_of_a_store_are_those_of_its_stats(path: Path, collected: Collected):
    with foldlog.open(path, step=crash_at("writer.before_write", 3)) as store:
        metrics.observe(store, "flags", meter_provider=collected.provider)
        for number in range(1, 6):
            store.apply([Put(f"{number}", b"x")], number)
        store.compact()
        store.apply([Put("6", b"x")], 6)
        store.sync()
        watch = store.watch()
        value, stats = collected.value, store.stats()
        name = {"foldlog.name": "flags"}
        assert value("foldlog.store.state", state="running", **name) == 1
        assert value("foldlog.store.state", state="failed", **name) == 0
        assert value("foldlog.store.health", status="degraded", **name) == 1
        assert value("foldlog.store.sequence", **name) == 6
        assert value("foldlog.store.synced.lag") == 0
        assert value("foldlog.store.batches") == stats.batches
        assert value("foldlog.store.groups") == stats.groups
        assert value("foldlog.store.restarts", **{"foldlog.actor": "writer"}) == 1
        assert value("foldlog.store.compactions") == 1
        assert value("foldlog.store.entries") == 6
        part = {"foldlog.log.part": "base"}
        until(  # RocksDB's own files may still grow
            lambda: value("foldlog.store.log.size", **part) == store.stats().base_bytes,
            "the size is that of the statistics",
        )
        assert value("foldlog.store.subscriptions") == 1
        watch.close()
    assert collected.values("foldlog.store.sequence") == {}, "a closed store is told of no more"


def test_every_batch_is_in_the_histograms_once_however_often_they_are_collected(
    path: Path, collected: Collected
):
    with foldlog.open(path) as store:
        metrics.observe(store, meter_provider=collected.provider)
        for number in range(1, 31):
            store.apply([], number)
            if number % 7 == 0:
                collected.values("foldlog.store.apply.duration")
        until(lambda: sum(store._core.statistics.latency.counts) == 30, "all are counted")
        ((labels, point),) = collected.values("foldlog.store.apply.duration").items()
        assert dict(labels) == {"foldlog.name": path.name}
        assert point.count == 30
        assert point.sum == pytest.approx(sum(store._core.statistics.latency.sums))
        assert tuple(point.explicit_bounds) == store._core.statistics.latency.bounds
        assert list(point.bucket_counts) == store._core.statistics.latency.counts
        ((_, sizes),) = collected.values("foldlog.store.group.size").items()
        assert sizes.sum == 30


@pytest.mark.append_log("it is followed")
def test_a_follower_is_told_of_as_well(path: Path, collected: Collected):
    with foldlog.open(path) as store, foldlog.follow(path) as follower:
        metrics.observe(follower, "worker", meter_provider=collected.provider)
        follower.wait_for(seq=store.put("a", b""))
        assert collected.value("foldlog.follower.sequence") == 1
        assert collected.value("foldlog.follower.state", state="following") == 1
        assert 0.0 <= collected.value("foldlog.follower.delay") < 5.0
        assert collected.value("foldlog.follower.reloads") == follower.stats().reloads


def test_a_name_is_taken_until_its_store_is_closed_or_no_more_observed(
    path: Path, tmp_path: Path, collected: Collected
):
    options: dict[str, Any] = {"meter_provider": collected.provider}
    first, second = foldlog.open(path), foldlog.open(tmp_path / "second.log")
    observing = metrics.observe(first, "flags", **options)
    with pytest.raises(metrics.MetricNameTaken) as caught:
        metrics.observe(second, "flags", **options)
    assert caught.value.name == "flags"
    assert isinstance(caught.value, foldlog.FoldlogError)
    metrics.observe(second, "others", **options)
    observing.stop()
    observing.stop()
    metrics.observe(second, "flags", **options)
    second.close()
    metrics.observe(first, "flags", **options)
    assert collected.value("foldlog.store.sequence", **{"foldlog.name": "flags"}) == 0
    first.close()
    with pytest.raises(TypeError):
        metrics.observe(first.snapshot, "x", **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        metrics.observe(first, 7, **options)  # type: ignore[arg-type]


def test_names_and_units_keep_the_conventions():
    """Dots separate words, and no name contains a unit or is a prefix of another.

    Units are from UCUM or in braces.
    """
    instruments = metrics.STORE_INSTRUMENTS | metrics.FOLLOWER_INSTRUMENTS
    for name, each in instruments.items():
        assert re.fullmatch(r"foldlog(\.[a-z]+)+", name)
        assert each.unit in {"1", "s", "By"} or re.fullmatch(r"\{[a-z]+\}", each.unit)
        assert each.description.endswith(".")
        assert not re.search(r"(seconds|bytes|total|count)$", name)


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.append_log("it is followed")
def test_prometheus_scrapes_them_from_a_real_endpoint_and_the_dashboard_asks_for_nothing_else(
    path: Path,
):
    registry = CollectorRegistry()
    reader = _reader(registry)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with foldlog.open(path) as store, foldlog.follow(path) as follower:
            metrics.observe(store, "flags", meter_provider=provider)
            metrics.observe(follower, "worker", meter_provider=provider)
            follower.wait_for(seq=store.put("a", b"1"))
            store._core.statistics.note_restart(foldlog.Restart("writer", "x", 0.0, 0.0), OSError())
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            page = scraped(url)
            assert "foldlog_store_state{" in page
            assert re.search(r"^foldlog_store_batches_total\{[^}]*\} 1\.0$", page, re.MULTILINE)
            assert "foldlog_store_apply_duration_seconds_bucket{" in page
            assert re.search(r'^foldlog_store_log_size_bytes\{[^}]*"base"', page, re.MULTILINE)
            names = set(re.findall(r"^(foldlog_\w+)\{", page, re.MULTILINE))
            asked = set(re.findall(r"foldlog_\w+", _expressions()))
            asked -= {"foldlog_name", "foldlog_actor", "foldlog_log_part"}
            assert asked <= names, asked - names
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        provider.shutdown()


def _reader(registry: CollectorRegistry) -> PrometheusMetricReader:
    reader = PrometheusMetricReader(disable_target_info=True)
    import prometheus_client

    prometheus_client.REGISTRY.unregister(reader._collector)
    registry.register(reader._collector)
    reader.shutdown = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return reader


def _expressions() -> str:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(targets) >= 12
    return "\n".join(target["expr"] for target in targets)


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["uid"] == "foldlog"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        assert panel["title"]
