"""`fscached trace`, as people call it."""

import json
import sys

import pytest

from fscached.cli import main
from fscached.cli._trace import shown
from fscached.prefetch.files import uses
from fscached.prefetch.trace import Access, Trace, decode, encode
from fscached.transport.mount import Mount
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.owners import files
from rafs_v6.pack import Format
from tests.control.conftest import StandInTraces
from tests.rafs_v6.trees import build, directory, regular

PAGE = 4096
FSID = "f" * 64
REFERENCE = "host/app:1"


@pytest.fixture(scope="module")
def bootstrap():
    """An image of a few files."""
    tree = directory(
        {
            b"app": regular(b"a" * 3 * PAGE + b"app"),
            b"etc": directory({b"passwd": regular(b"p" * PAGE)}),
            b"odd\x1b[2J": regular(b"odd" * 2000),
            b"twin": regular(b"t" * PAGE),
            b"twin2": regular(b"t" * PAGE),
        }
    )
    return build(tree, form=Format(chunk_bytes=PAGE)).image.bootstrap


@pytest.fixture
def traces(daemon, bootstrap, tmp_path):
    """The stand-in, in the daemon's stand-in."""
    (path := tmp_path / "image.boot").write_bytes(bootstrap)
    daemon.traces = StandInTraces(str(path))
    return daemon.traces


@pytest.fixture
def trace(config_file, capsys):
    """Runs one verb of `fscached trace`: exit status, standard output and error."""

    def run(verb, *words):
        offline = verb == "merge"
        daemon = [] if offline else ["--config", config_file]
        status = main(["trace", verb, *daemon, *map(str, words)])
        return status, *capsys.readouterr()

    return run


def traced(bootstrap, *reads, runs=1, named=False, reference=REFERENCE):
    """A trace in which these files were read, one every 10 ms; of a pair only that chunk. What
    begins with `~` was brought by prefetch."""
    image = Bootstrap(bootstrap)
    there = {file.path: places for file, places in files(image)}
    found = {}
    for moment, read in enumerate(reads):
        path, chunk = read if isinstance(read, tuple) else (read, None)
        counts = (0, 1) if path.startswith(b"~") else (1, 0)
        places = there[path.lstrip(b"~")]
        for blob, start in places if chunk is None else [places[chunk]]:
            blob_id = image.blobs[blob].blob_id
            access = Access(blob_id, start, start + PAGE, moment / 100, *counts)
            found.setdefault((blob, start), access)
    accesses = tuple(found.values())
    names = tuple(use.brief for use in uses(image, accesses)) if named else ()
    return Trace(FSID, reference, runs, accesses, names)


def test_show_lists_files_in_order_and_harmlessly(traces, trace, bootstrap):
    """First used first, and a hostile name moves no cursor."""
    traces.traces[REFERENCE] = traced(bootstrap, b"/odd\x1b[2J", (b"/app", 3), b"~/etc/passwd")
    status, out, _ = trace("show", REFERENCE)
    assert status == 0
    head, *lines = out.splitlines()
    assert head == f"{REFERENCE}: 1 cold runs, 12.0 KiB read in 3 chunks, 4.0 KiB only prefetched"
    assert [line.split() for line in lines] == [
        ["0.000", "s", "2", "of", "2", r"/odd\x1b[2J"],
        ["0.010", "s", "1", "of", "2", "/app"],
    ]
    status, out, _ = trace("show", REFERENCE, "-o", "json", "--run")
    told = json.loads(out)
    assert (told["bytes_read"], told["chunks_prefetched"]) == (3 * PAGE, 1)
    assert told["files"][1] == {"path": "/app", "after_s": 0.01, "chunks_read": 1, "chunks": 2}
    assert traces.asked == [(REFERENCE, False), (REFERENCE, True)]


def test_a_mount_point_stands_for_its_image(traces, trace, mounts, bootstrap, tmp_path):
    """DIR is looked up in the mount table; a directory without an image is told so."""
    mounts.table.append(Mount(FSID, "", str(tmp_path), "0:9"))
    traces.traces[FSID] = traced(bootstrap, b"/app")
    assert trace("show", tmp_path)[0] == 0
    (tmp_path / "other").mkdir()
    status, _, err = trace("show", tmp_path / "other")
    assert status == 3
    assert "no image is mounted there" in err


def test_what_nobody_recorded_is_missing(traces, trace):
    """One line, and what would help."""
    status, _, err = trace("show", "host/none:1")
    (line,) = err.splitlines()
    assert status == 3
    assert "no run of it is known" in line
    assert "fscached status" in line


def test_export_names_the_files_and_import_takes_them(traces, trace, bootstrap, tmp_path):
    """What one node exports another imports, by file or by standard output."""
    traces.traces[REFERENCE] = traced(bootstrap, b"/etc/passwd", b"/app")
    assert trace("export", REFERENCE, "--to", tmp_path / "t")[0] == 0
    exported = decode((tmp_path / "t").read_bytes())
    assert [use.path for use in exported.files] == [b"/etc/passwd", b"/app"]
    assert exported.accesses == traces.traces[REFERENCE].accesses
    status, out, _ = trace("export", REFERENCE)
    assert decode(out.encode()) == exported
    status, out, _ = trace("import", tmp_path / "t")
    assert (status, traces.traces["adopted"]) == (0, exported)
    assert f"{REFERENCE}, 3 chunks" in out


def test_a_file_is_shown_without_a_daemon(trace, bootstrap, tmp_path):
    """By the names in it, or by those of an image."""
    (tmp_path / "named").write_bytes(encode(traced(bootstrap, b"/app", named=True)))
    (tmp_path / "nameless").write_bytes(encode(traced(bootstrap, b"/app")))
    (tmp_path / "image.boot").write_bytes(bootstrap)
    assert "/app" in trace("show", tmp_path / "named")[1]
    status, _, err = trace("show", tmp_path / "nameless")
    assert status == 1
    assert "say its --image" in err
    words = ["--image", tmp_path / "image.boot"]
    assert "/app" in trace("show", tmp_path / "nameless", *words)[1]
    assert trace("show", tmp_path / "named", "--image", tmp_path / "none")[0] == 3
    assert trace("show", tmp_path / "named", "--image", f"oci:{tmp_path}")[0] == 1
    assert trace("show", tmp_path / "named", "--image", tmp_path / "named")[0] == 1


def test_merge_joins_runs_of_one_image(trace, bootstrap, tmp_path):
    """Runs add up; traces of two images do not."""
    for name, read in (("a", b"/app"), ("b", b"/etc/passwd")):
        (tmp_path / name).write_bytes(encode(traced(bootstrap, read, named=True)))
    status, out, _ = trace("merge", tmp_path / "a", tmp_path / "b")
    merged = decode(out.encode())
    assert (status, merged.runs, len(merged.files)) == (0, 2, 2)
    other = traced(bootstrap, b"/app")._replace(fsid="0" * 64)
    (tmp_path / "c").write_bytes(encode(other))
    status, _, err = trace("merge", tmp_path / "a", tmp_path / "c", "--to", tmp_path / "d")
    assert status == 2
    assert "different images" in err
    assert not (tmp_path / "d").exists()


def test_diff_lists_what_was_never_read_before(traces, trace, bootstrap, tmp_path):
    """1 when there is something, 0 when there is not; by chunks where the image is at hand."""
    (tmp_path / "base").write_bytes(encode(traced(bootstrap, (b"/app", 0), b"/twin")))
    traces.traces[REFERENCE] = traced(bootstrap, b"/app", b"/twin2", b"/etc/passwd")
    status, out, err = trace("diff", tmp_path / "base", REFERENCE)
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines()] == ["/etc/passwd"]
    assert "1 files were never read before" in err
    assert traces.asked == [(REFERENCE, True)]
    status, out, _ = trace("diff", tmp_path / "base", REFERENCE, "-o", "json")
    assert json.loads(out)[0]["path"] == "/etc/passwd"
    traces.traces[REFERENCE] = traced(bootstrap, b"/app", b"/twin2")
    assert trace("diff", tmp_path / "base", REFERENCE)[:2] == (0, "")


def test_diff_says_whose_twin_it_may_have_been(traces, trace, bootstrap, tmp_path):
    """Equal data is stored once: which of the files was read nobody knows."""
    (tmp_path / "base").write_bytes(encode(traced(bootstrap, b"/app")))
    traces.traces[REFERENCE] = traced(bootstrap, b"/twin")
    status, out, _ = trace("diff", tmp_path / "base", REFERENCE)
    assert status == 1
    assert out.rstrip().endswith("/twin, or another of 1 files with this data")


def test_diff_of_two_files_goes_by_names(trace, bootstrap, tmp_path):
    """Also for an image that was built anew, whose blobs are others."""
    newer = build(
        directory({b"app": regular(b"new"), b"etc": directory({b"shadow": regular(b"s")})})
    ).image.bootstrap
    (tmp_path / "base").write_bytes(encode(traced(bootstrap, b"/app", named=True)))
    (tmp_path / "run").write_bytes(encode(traced(newer, b"/app", b"/etc/shadow", named=True)))
    status, out, _ = trace("diff", tmp_path / "base", tmp_path / "run")
    assert status == 1
    assert [line.split()[-1] for line in out.splitlines()] == ["/etc/shadow"]
    assert trace("diff", tmp_path / "run", tmp_path / "base")[0] == 0


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 10, b'{"trace": 9}'])
def test_diff_of_what_is_no_trace_is_not_taken_for_news(trace, bootstrap, tmp_path, data):
    """Status 1 means new files and nothing else."""
    (tmp_path / "base").write_bytes(encode(traced(bootstrap, b"/app", named=True)))
    (tmp_path / "run").write_bytes(data)
    for words in ((tmp_path / "base", tmp_path / "run"), (tmp_path / "run", tmp_path / "base")):
        status, _, err = trace("diff", *words)
        assert status == 2
        assert len(err.splitlines()) == 1
    assert trace("diff", tmp_path / "base", tmp_path / "none")[0] == 3


def test_a_path_where_nothing_is_is_no_image_to_ask_for(trace, tmp_path):
    """Whether a daemon runs does not matter then: no image's reference begins like a path."""
    for verb in (("diff", "/nofile", "/nofile2"), ("show", "./nofile"), ("export", "../nofile")):
        status, _, err = trace(*verb)
        assert (status, "no such file" in err) == (3, True)
        assert verb[1] in err and "daemon" not in err


def test_record_begins_a_run_and_says_what_it_cannot_see(traces, trace):
    """Without prefetch unless asked; what is here already may be read unseen."""
    traces.traces[REFERENCE] = Trace(FSID, REFERENCE, 0, ())
    assert trace("record", REFERENCE) == (
        0,
        f"{REFERENCE}: a new run is recorded until its last umount\n",
        "",
    )
    traces.resident_bytes = 5 << 20
    assert "5.0 MiB of its data are here already" in trace("record", REFERENCE, "--prefetch")[2]
    assert [wanted.prefetch for wanted in traces.asked] == [False, True]
    status, _, err = trace("record", "host/other:1")
    assert status == 1
    assert "is not mounted" in err


def test_forget(traces, trace, bootstrap):
    """Once; then there is nothing to forget."""
    traces.traces[REFERENCE] = traced(bootstrap, b"/app")
    assert trace("forget", REFERENCE)[0] == 0
    assert trace("forget", REFERENCE)[0] == 1


def test_a_plot_shows_readers_and_prefetch_in_two_colours(traces, trace, bootstrap, tmp_path):
    """The same trace is the same picture."""
    traces.traces[REFERENCE] = traced(bootstrap, b"/app", b"~/etc/passwd")
    for name in ("a.svg", "b.svg"):
        assert trace("show", REFERENCE, "--plot", tmp_path / name)[0] == 0
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert "read (2 chunks)" in picture
    assert "prefetched (1 chunks)" in picture
    assert {"#d1495b", "#2e86ab"} <= set(picture.replace(";", " ").replace('"', " ").split())


def test_without_matplotlib_a_plot_is_a_missing_precondition(
    traces, trace, bootstrap, tmp_path, monkeypatch
):
    """Status 3 and what to install; the rest of `trace` does without."""
    traces.traces[REFERENCE] = traced(bootstrap, b"/app")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = trace("show", REFERENCE, "--plot", tmp_path / "a.svg")
    assert status == 3
    assert "extra `plot`" in err
    assert trace("show", REFERENCE)[0] == 0


def test_names_are_shown_as_they_are_where_that_is_safe():
    """Letters of any script stay; controls, and what is no text, are written out."""
    assert shown("/ä/日本".encode()) == "/ä/日本"
    assert shown(b"/\xff\n\x1b") == r"/\xff\n\x1b"
