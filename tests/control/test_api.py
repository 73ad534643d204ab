"""The control API's routes, asked through the command line's own client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fscached.control import api, http, messages
from fscached.control.client import Client, DaemonAway, DaemonError
from fscached.control.messages import CollectGarbage, Credentials
from fscached.source import Fault, SourceError
from tests.control.conftest import TRACE

pytestmark = pytest.mark.asyncio

FSID = "f" * 64
ENTRY = {
    "type": "bootstrap",
    "id": FSID,
    "domain_id": "shared",
    "config": {
        "backend_type": "registry",
        "backend_config": {"host": "registry.test", "repo": "app"},
        "cache_type": "fscache",
        "cache_config": {"work_dir": "/w"},
        "metadata_path": "/w/image.boot",
    },
}


@pytest.fixture
def client(server: http.Server, socket_path: str) -> Client:
    """A client of the running server."""
    return Client(socket_path, timeout_s=20)


async def call(what: Callable[..., Any], *arguments: Any, **query: str) -> Any:
    return await asyncio.to_thread(what, *arguments, **query)


async def refused(what: Callable[..., Any], *arguments: Any, **query: str) -> DaemonError:
    with pytest.raises(DaemonError) as caught:
        await call(what, *arguments, **query)
    return caught.value


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_daemon_info_has_what_the_go_client_needs(client: Client, version: str) -> None:
    """Strings in `version`, nulls where nydusd has them."""
    info = await call(client.get, f"/api/{version}/daemon")
    assert info["state"] == "RUNNING"
    assert info["id"] is info["supervisor"] is info["backend_collection"] is None
    assert all(isinstance(value, str) for value in info["version"].values())
    assert set(info["version"]) == {
        "package_ver",
        "git_commit",
        "build_time",
        "profile",
        "rustc",
    }


async def test_the_log_level_is_set(client: Client) -> None:
    """`nydusctl set log-level`; an unknown level changes nothing."""
    logger = logging.getLogger("fscached")
    before = logger.level
    try:
        await call(client.put, "/api/v1/daemon", {"log_level": "debug"})
        assert logger.level == logging.DEBUG
        error = await refused(client.put, "/api/v1/daemon", {"log_level": "loud"})
        assert (error.status, "unknown log level" in str(error)) == (400, True)
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)


async def test_a_blob_entry_is_bound(client: Client, service: Any) -> None:
    """What a snapshotter sends arrives parsed."""
    await call(client.put, "/api/v2/blobs", ENTRY)
    [entry] = service.asked
    assert (entry.id, entry.domain_id, entry.metadata_path) == (FSID, "shared", "/w/image.boot")


@pytest.mark.parametrize("key", ["id", "domain_id"])
async def test_an_id_with_a_slash_is_refused(client: Client, service: Any, key: str) -> None:
    """It would become a path of the kernel's cache."""
    error = await refused(client.put, "/api/v2/blobs", ENTRY | {key: "a/b"})
    assert error.status == 400
    assert f"$.{key}" in str(error)
    assert service.asked == []


async def test_the_three_ways_to_delete_blobs(client: Client, service: Any) -> None:
    """A domain, an entry of a domain, or a cache file."""
    await call(client.delete, "/api/v2/blobs", domain_id="d")
    await call(client.delete, "/api/v2/blobs", domain_id="d", blob_id="b")
    await call(client.delete, "/api/v2/blobs", blob_id="b")
    assert service.asked == [("unbind", "d", ""), ("unbind", "d", "b"), ("cull", "b")]
    assert (await refused(client.delete, "/api/v2/blobs")).status == 400


async def test_the_cache_is_listed_and_collected(client: Client, service: Any) -> None:
    """All files; and what may go, by a body of which every key has a default."""
    listing = await call(client.get, "/api/v2/cache")
    assert [file["cookie"] for file in listing["files"]] == ["b" * 64]
    collected = await call(client.put, "/api/v2/cache/gc", {"dry_run": True})
    assert collected["culled"][0]["why"] == "orphan"
    assert service.asked == [CollectGarbage(dry_run=True)]
    error = await refused(client.put, "/api/v2/cache/gc", {"everything": True})
    assert error.status == 400 and "everything" in str(error)


async def test_a_missing_entry_is_said_in_the_words_the_snapshotter_looks_for(
    client: Client, service: Any
) -> None:
    """Only where an entry was named: an empty domain is no error."""
    service.found = False
    await call(client.delete, "/api/v2/blobs", domain_id="d")
    error = await refused(client.delete, "/api/v2/blobs", domain_id="d", blob_id="b")
    assert error.status == 500
    assert "blob_cache: cache entry not found" in str(error)


async def test_bound_blobs_are_listed(client: Client) -> None:
    """nydusd panics here; we answer, filtered by domain and blob."""
    for query, count in [
        ({}, 1),
        ({"domain_id": "fscached", "blob_id": "b" * 64}, 1),
        ({"domain_id": "other"}, 0),
    ]:
        assert len(await call(client.get, "/api/v2/blobs", **query)) == count


async def test_an_image_is_added_with_credentials(client: Client, service: Any) -> None:
    """The reply has what a mount needs."""
    body = {"reference": "r.test/a@sha256:" + "0" * 64}
    image = await call(client.put, "/api/v2/images", body)
    assert image == {
        "reference": "registry.test/app:1",
        "fsid": FSID,
        "domain_id": "fscached",
        "manifest_digest": "sha256:" + "a" * 64,
        "blobs": ["b" * 64],
        "settled": False,
        "bootstrap": "",
        "devices": None,
    }
    credentials = {"username": "u", "password": "hunter2"}
    await call(client.put, "/api/v2/images", body | {"credentials": credentials})
    assert service.asked == [
        (body["reference"], None),
        (body["reference"], Credentials("u", "hunter2")),
    ]
    assert "hunter2" not in repr(service.asked)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"reference": ""},
        {"reference": "a b"},
        {"reference": "user:hunter2@registry.test/app"},
        {"reference": "a\nb"},
        {"reference": "a" * 2000},
        {"reference": "a", "credential": {}},
        {"reference": "a", "credentials": {"username": "u", "password": "hunter2", "x": 1}},
        {"reference": "a", "credentials": {"username": "u", "password": ["hunter2"]}},
        [],
    ],
)
async def test_a_bad_image_request_is_refused_without_its_secrets(
    client: Client, service: Any, body: Any
) -> None:
    """One error that names the key, and never quotes a value."""
    error = await refused(client.put, "/api/v2/images", body)
    assert (error.status, str(error).startswith("ParseBody(")) == (400, True)
    assert "hunter2" not in str(error)
    assert service.asked == []


async def test_a_registrys_failure_is_502_with_its_own_words(client: Client, service: Any) -> None:
    """SourceError texts hold no secrets and say whose fault it is."""

    async def pull() -> None:
        raise SourceError("registry.test: 503 to the manifest of app:1", Fault.ORIGIN)

    service.pull = pull
    error = await refused(client.put, "/api/v2/images", {"reference": "registry.test/app:1"})
    assert (error.status, error.what) == (502, "registry.test: 503 to the manifest of app:1")


async def test_images_are_listed_and_removed(client: Client, service: Any) -> None:
    """An unknown fsid is 404."""
    assert [image["fsid"] for image in await call(client.get, "/api/v2/images")] == [FSID]
    await call(client.delete, "/api/v2/images", fsid=FSID)
    assert service.asked == [("remove", FSID)]
    service.found = False
    assert (await refused(client.delete, "/api/v2/images", fsid="x")).status == 404
    assert (await refused(client.delete, "/api/v2/images")).status == 400


async def test_prefetch_is_ordered_and_reported(client: Client, service: Any) -> None:
    """By fsid; how it goes on is a reply of its own."""
    status = await call(client.put, "/api/v2/prefetch", {"fsid": FSID})
    assert service.asked == [("prefetch", FSID)]
    assert status == await call(client.get, "/api/v2/prefetch", fsid=FSID)
    assert (status["phase"], status["left_bytes"], status["eta_s"]) == ("running", 4096, 2.0)
    assert (await refused(client.get, "/api/v2/prefetch")).status == 400
    assert (await refused(client.put, "/api/v2/prefetch", {"fsid": ""})).status == 400


async def test_traces_go_out_and_come_in(client: Client, service: Any) -> None:
    """As a file of `fscached trace export` has them; what is none is refused."""
    service.traces.traces[FSID] = TRACE
    known = await call(client.get, "/api/v2/traces", image=FSID)
    assert (known["trace"]["fsid"], len(known["trace"]["accesses"])) == (FSID, 1)
    assert known["bootstrap"] == "/state/image.boot"
    await call(client.get, "/api/v2/traces", image=FSID, run="true")
    assert service.traces.asked == [(FSID, False), (FSID, True)]
    await call(client.put, "/api/v2/traces", known["trace"])
    assert service.traces.traces["adopted"] == TRACE
    await call(client.delete, "/api/v2/traces", image=FSID)
    assert (await refused(client.get, "/api/v2/traces", image=FSID)).status == 404
    assert (await refused(client.delete, "/api/v2/traces", image=FSID)).status == 404


async def test_a_run_is_begun_by_name(client: Client, service: Any) -> None:
    """Without prefetch unless it is wanted; 409 for what is not mounted."""
    service.traces.traces[FSID] = TRACE
    begun = await call(client.put, "/api/v2/traces/record", {"image": FSID})
    assert begun == {"fsid": FSID, "reference": FSID, "resident_bytes": 0}
    await call(client.put, "/api/v2/traces/record", {"image": FSID, "prefetch": True})
    assert [wanted.prefetch for wanted in service.traces.asked] == [False, True]
    error = await refused(client.put, "/api/v2/traces/record", {"image": "other"})
    assert (error.status, "not mounted" in str(error)) == (409, True)


@pytest.mark.parametrize(
    ("method", "path", "arguments", "query"),
    [
        ("get", "/api/v2/traces", (), {}),
        ("get", "/api/v2/traces", (), {"image": FSID, "run": "perhaps"}),
        ("put", "/api/v2/traces", ({"trace": 1},), {}),
        ("put", "/api/v2/traces", ([],), {}),
        ("delete", "/api/v2/traces", (), {}),
        ("put", "/api/v2/traces/record", ({},), {}),
        ("put", "/api/v2/traces/record", ({"image": FSID, "more": 1},), {}),
    ],
)
async def test_what_is_asked_wrongly_of_traces_is_400(
    client: Client, method: str, path: str, arguments: tuple[Any, ...], query: dict[str, str]
) -> None:
    """One message, nothing done."""
    assert (await refused(getattr(client, method), path, *arguments, **query)).status == 400


async def test_status_is_the_whole_status(client: Client) -> None:
    """Daemon, totals, images and their objects."""
    status = await call(client.get, "/api/v2/status")
    assert (status["pid"], status["state"], status["totals"]["reads"]) == (812, "RUNNING", 4)
    assert status["images"][0]["blobs"][0]["resident_bytes"] == 4096


@pytest.mark.parametrize("query", [{}, {"id": FSID}, {"id": f"/{FSID}"}])
async def test_nydusds_metrics_of_an_image(client: Client, query: dict[str, str]) -> None:
    """With the slash the snapshotter puts before the id, and for the only image without one."""
    cache = await call(client.get, "/api/v1/metrics/blobcache", **query)
    assert cache["underlying_files"] == ["b" * 64 + ".blob.data"]
    assert (cache["total"], cache["whole_hits"], cache["data_all_ready"]) == (4, 1, False)
    backend = await call(client.get, "/api/v1/metrics/backend", **query)
    assert (backend["read_count"], backend["read_amount_total"]) == (6, 4050)
    assert (backend["read_errors"], backend["read_cumulative_latency_millis_total"]) == (2, 3540)
    assert backend["read_count_block_size_dist"] == [4, 0, 0, 0, 0, 0, 0, 2]
    assert backend["read_latency_sizes_dist"][0] == [1, 2, 0, 0, 0, 0, 0, 1]
    assert backend["read_latency_sizes_dist"][7] == [0, 2, 0, 0, 0, 0, 0, 0]
    files = await call(client.get, "/api/v1/metrics", **query)
    assert files["read_latency_dist"] == [1, 2, 0, 0, 0, 0, 0, 1]
    assert files["data_read"] == (4050 if query else 4000)


async def test_metrics_before_anything_was_read(client: Client, service: Any) -> None:
    """All that the snapshotter asks of an image it has just bound is there: zeros."""
    service.image_status = [
        msgspec.structs.replace(service.image_status[0], demand=messages.DemandStatus())
    ]
    backend = await call(client.get, "/api/v1/metrics/backend")
    assert backend["read_count_block_size_dist"] == [0] * 8
    assert backend["read_latency_sizes_dist"] == [[0] * 8] * 8
    assert (await call(client.get, "/api/v1/metrics/blobcache"))["total"] == 0


async def test_credentials_are_updated_and_never_told(client: Client, service: Any) -> None:
    """With the slash the snapshotter puts before the id; whoever asks learns nothing."""
    body = {"registry_auth": "dTpodW50ZXIy"}
    await call(client.put, "/api/v1/config?id=%2F7", body)
    assert service.asked == [("auth", "7", "dTpodW50ZXIy")]
    assert await call(client.get, "/api/v1/config", id=FSID) == {"registry_auth": None}
    assert (await refused(client.put, "/api/v1/config", body)).status == 400
    assert (await refused(client.put, "/api/v1/config?id=7", {"registry_auth": 7})).status == 400
    service.found = False
    assert (await refused(client.put, "/api/v1/config?id=7", body)).status == 404


async def test_metrics_of_no_or_several_images_are_404(client: Client, service: Any) -> None:
    """nydusd's rule: without an id only when there is exactly one."""
    assert (await refused(client.get, "/api/v1/metrics/blobcache", id="x")).status == 404
    service.image_status *= 2
    assert (await refused(client.get, "/api/v1/metrics/backend")).status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("get", "/api/v1/daemon/backend", 501),
        ("put", "/api/v1/mount", 501),
        ("delete", "/api/v1/mount", 501),
        ("get", "/api/v1/metrics/files", 404),
        ("get", "/api/v1/metrics/inflight", 501),
        ("get", "/api/v1/events", 404),
        ("put", "/api/v2/status", 400),
    ],
)
async def test_what_only_a_fuse_daemon_does(
    client: Client, method: str, path: str, status: int
) -> None:
    """nydusd's statuses for it in fscache mode."""
    assert (await refused(getattr(client, method), path)).status == status


async def test_events_are_the_last_errors(
    client: Client, life: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the daemon appears, and is counted."""

    def broken() -> None:
        raise KeyError("x")

    root = logging.getLogger()
    root.addHandler(api.log.recent_errors)
    try:
        monkeypatch.setattr(life, "info", broken)
        assert (await refused(client.get, "/api/v1/daemon")).status == 500
        events = await call(client.get, "/api/v1/daemon/events")
    finally:
        root.removeHandler(api.log.recent_errors)
        api.log.recent_errors.lines.clear()
    assert "a bug of ours: GET /api/v1/daemon" in events["errors"][-1]
    assert events["total_errors"] >= 1
    assert events["total_size"] == sum(map(len, events["errors"]))


async def test_prometheus_text(
    server: http.Server, exchange: Callable[..., Coroutine[Any, Any, bytes]]
) -> None:
    """As Prometheus' own client reads it: each name once, histograms cumulative, labels escaped."""
    reply = await exchange(b"GET /metrics HTTP/1.1\r\nHost: unix\r\n\r\n")
    head, _, body = reply.decode().partition("\r\n\r\n")
    assert "Content-Type: text/plain; version=0.0.4" in head
    families = list(text_string_to_metric_families(body))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) and all(family.documentation for family in families)
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    image = (("fsid", FSID), ("reference", "registry.test/app:1"))
    assert values["fscached_reads_total",] == 4
    assert values[("fscached_image_resident_bytes", *image)] == 8192
    assert values[("fscached_image_prefetch_left_bytes", *image)] == 4096
    assert values[("fscached_image_prefetch", image[0], ("phase", "running"), image[1])] == 1
    assert values[("fscached_image_reads_total", *image, ("result", "misses"))] == 3
    assert values[("fscached_image_read_seconds_sum", *image)] == 3.5
    assert values["fscached_read_seconds_bucket", ("le", "0.02")] == 3
    assert values["fscached_read_seconds_bucket", ("le", "+Inf")] == 4
    assert values["fscached_read_seconds_count",] == 4
    source = ("source", 'registry.test/"app"')
    assert values["fscached_source_requests_total", source] == 5
    assert values["fscached_source_seconds_bucket", ("le", "0.001"), source] == 0
    assert values["fscached_source_seconds_bucket", ("le", "0.02"), source] == 2


async def test_nobody_on_the_socket(tmp_path: Any) -> None:
    """The error names the socket, why, and what to start."""
    with pytest.raises(DaemonAway, match=r"no\.sock .No such file.*fscached supervise") as caught:
        await call(Client(str(tmp_path / "no.sock")).get, "/api/v1/daemon")
    assert caught.value.exit_code == 3


async def test_a_daemon_that_does_not_reply(
    service: Any, server: http.Server, socket_path: str
) -> None:
    """The client gives up after its timeout."""
    given_up = asyncio.Event()
    service.pull = given_up.wait
    client = Client(socket_path, timeout_s=0.05)
    with pytest.raises(DaemonAway, match=r"no reply within 0\.05 s"):
        await call(client.put, "/api/v2/images", {"reference": "a"})
    given_up.set()


async def test_every_route_answers_json_to_a_wrong_method(
    server: http.Server, exchange: Callable[..., Coroutine[Any, Any, bytes]]
) -> None:
    """400, as nydusd does, never 405."""
    for path in (*api.LIFE, *api.ROUTES):
        reply = await exchange(b"PATCH %s HTTP/1.1\r\nHost: u\r\n\r\n" % path.encode())
        assert reply.startswith(b"HTTP/1.1 400")
        assert "takes" in json.loads(reply.partition(b"\r\n\r\n")[2])["message"]


NESTED = b"[" * 4000 + b"]" * 4000


@pytest.mark.parametrize(
    "body",
    [
        b'{"reference": ',
        b"{} {}",
        b"null",
        b'"text"',
        b'{"log_level": "\xff"}',
        b"\x00" * 64,
        NESTED,
        b'{"log_level": "info", "type": "bootstrap", "registry_auth": "a", "x": %s}' % NESTED,
    ],
)
async def test_no_route_takes_a_malformed_body(
    server: http.Server,
    service: Any,
    exchange: Callable[..., Coroutine[Any, Any, bytes]],
    caplog: pytest.LogCaptureFixture,
    body: bytes,
) -> None:
    """Whatever is no JSON, is another kind of JSON, or is nested without end: one error that is the
    client's, and nothing done."""
    for path, methods in {**api.LIFE, **api.ROUTES}.items():
        if "PUT" in methods:
            head = f"PUT {path}?id=a HTTP/1.1\r\nHost: u\r\nContent-Length: {len(body)}\r\n\r\n"
            reply = await exchange(head.encode() + body)
            status = int(reply.split()[1])
            assert status == (501 if path == "/api/v1/mount" else 400), (path, reply)
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["message"]
    assert service.asked == [] and "a bug of ours" not in caplog.text
