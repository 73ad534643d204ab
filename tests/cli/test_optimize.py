"""`fscached image optimize` and `convert --trace`: what was read comes first."""

import json
import random
import urllib.request

import pytest

from fscached.cli import main
from fscached.cli._layout import machine_platform
from fscached.prefetch.files import uses
from fscached.prefetch.trace import Access, Trace, encode
from fscached.store import unpack_bootstrap
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.oci import Layout
from rafs_v6.owners import files
from rafs_v6.revision import bootstrap_descriptor
from tests.source.docker_registry import PROGRAM, docker_registry


@pytest.fixture
def root(tmp_path):
    """A directory to make an image of."""
    directory = tmp_path / "root"
    (directory / "bin").mkdir(parents=True)
    for name in ("bin/app", "bin/tool", "data", "zz"):
        (directory / name).write_text(f"{name} " * 3000)
    return directory


def bootstrap_of(layout):
    """The bootstrap of the only image in a layout."""
    opened = Layout(layout)
    with opened.open(bootstrap_descriptor(opened.image(None, machine_platform()))) as file:
        return Bootstrap(unpack_bootstrap(file.read()))


def recommended(layout):
    """What its prefetch table names."""
    image = bootstrap_of(layout)
    paths = {inode.nid: path for path, inode in image.walk()}
    return [paths[nid] for nid in image.prefetch_nids()]


def trace_of(image, *paths, named=True):
    """A trace in which these files were read one after the other."""
    there = {file.path: places for file, places in files(image)}
    accesses = (
        Access(image.blobs[place.blob_index].blob_id, place.offset, place.offset + 4096, moment)
        for moment, path in enumerate(paths)
        for place in there[path]
    )
    accesses = tuple({each[:2]: each for each in accesses}.values())
    names = tuple(use.brief for use in uses(image, accesses)) if named else ()
    return Trace("f" * 64, "host/app:1", 1, accesses, names)


@pytest.fixture
def image(root, tmp_path, capsys):
    """An image of it, in a layout."""
    assert main(["image", "convert", str(root), f"oci:{tmp_path}/image:1", "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def trace(image, tmp_path):
    """A trace in which `zz` was read before `bin/tool`."""
    path = tmp_path / "app.trace"
    path.write_bytes(encode(trace_of(bootstrap_of(tmp_path / "image"), b"/zz", b"/bin/tool")))
    return path


def test_the_table_follows_the_trace_and_the_blobs_stay(image, trace, tmp_path, capsys):
    """Only the bootstrap is another one; check has nothing to say about it."""
    source, target = f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/out:2"
    words = ["image", "optimize", source, target, "--trace", str(trace)]
    assert main([*words, "--prefetch", "/bin/app", "-o", "json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert recommended(tmp_path / "out") == [b"/bin/app", b"/zz", b"/bin/tool"]
    assert done["blobs"] == [blob["id"] for blob in image["blobs"]]
    assert (done["prefetch_entries"], done["digest"] != image["digest"]) == (3, True)
    assert main(["image", "check", target]) == 0
    assert main(words) == 0
    assert "2 names of 35.2 KiB come first; its 1 blobs are as they were" in capsys.readouterr().out
    assert recommended(tmp_path / "out") == [b"/zz", b"/bin/tool"]


def test_the_same_layout_holds_both(image, trace, tmp_path, capsys):
    """A new tag beside the old one, over the same blobs."""
    source, target = f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/image:2"
    assert main(["image", "optimize", source, target, "--trace", str(trace)]) == 0
    assert sorted(Layout(tmp_path / "image").tags()) == ["1", "2"]
    assert main(["image", "check", source]) == main(["image", "check", target]) == 0


def test_data_placed_anew_comes_in_the_order_of_the_trace(root, trace, tmp_path, capsys):
    """convert --trace puts what was read first at the beginning of the blob."""
    (root / "bin" / "tool").unlink()
    words = ["image", "convert", str(root), f"oci:{tmp_path}/new", "--compressor", "none"]
    assert main([*words, "--trace", str(trace), "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 2 names are not in the image" in err
    assert json.loads(out)["prefetch_entries"] == 1
    assert recommended(tmp_path / "new") == [b"/zz"]
    (blob,) = bootstrap_of(tmp_path / "new").blobs
    data = (tmp_path / "new" / "blobs" / "sha256" / blob.blob_id).read_bytes()
    assert data.startswith(b"zz zz ")
    assert main(["image", "check", f"oci:{tmp_path}/new"]) == 0


def test_a_trace_of_an_older_image_serves_by_its_names(root, image, trace, tmp_path, capsys):
    """Other blobs, the same names."""
    (root / "zz").write_text("another one\n")
    (root / "bin" / "app").write_text("another one, too\n")
    assert main(["image", "convert", str(root), f"oci:{tmp_path}/newer:1"]) == 0
    words = [f"oci:{tmp_path}/newer:1", f"oci:{tmp_path}/newest:1"]
    assert main(["image", "optimize", *words, "--trace", str(trace)]) == 0
    assert recommended(tmp_path / "newest") == [b"/zz", b"/bin/tool"]


def test_a_large_file_of_which_little_was_read_is_left_to_the_trace(root, tmp_path, capsys):
    """A table has whole files only; to bring all of one for a tenth of it would be waste."""
    (root / "large").write_bytes(random.Random(1).randbytes(40_960))
    words = ["image", "convert", str(root), f"oci:{tmp_path}/image:1", "--chunk-size", "4K"]
    assert main(words) == 0
    image = bootstrap_of(tmp_path / "image")
    large, small = (trace_of(image, path).accesses for path in (b"/large", b"/bin/tool"))
    assert len(large) == 10
    (tmp_path / "t").write_bytes(encode(Trace("f" * 64, "", 1, (large[0], *small))))
    words = [f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/out:1", "--trace", f"{tmp_path}/t"]
    assert main(["image", "optimize", *words]) == 0
    assert recommended(tmp_path / "out") == [b"/bin/tool"]


def test_what_comes_first_may_have_a_blob_of_its_own(image, trace, tmp_path, capsys):
    """In the order of the trace, the chunks of what is named behind; the old blob stays."""
    source, target = f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/out:1"
    words = ["image", "optimize", source, target, "--trace", str(trace), "--hot-blob"]
    assert main([*words, "--prefetch", "/bin", "-o", "json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["blobs"] == [image["blobs"][0]["id"], done["hot_blob"]]
    assert recommended(tmp_path / "out") == [b"/bin", b"/zz", b"/bin/tool"]
    assert main(["image", "check", target]) == 0
    hot = bootstrap_of(tmp_path / "out")
    there = {file.path: places for file, places in files(hot)}
    assert [there[path][0].blob_index for path in (b"/zz", b"/bin/tool", b"/bin/app")] == [1, 1, 1]
    order = sorted(there, key=lambda path: there[path][0].offset if path != b"/data" else 1 << 40)
    assert order == [b"/zz", b"/bin/tool", b"/bin/app", b"/data"]
    config = Layout(tmp_path / "out").image(None, machine_platform()).config
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert [step.get("empty_layer", False) for step in config["history"]] == [False] * 3
    assert main(words) == 0
    assert "are in a blob of their own" in capsys.readouterr().out


def test_a_blob_whose_data_is_all_hot_is_dropped(image, tmp_path, capsys):
    """Its layer and diff id go, of its history the entry stays, as an empty one."""
    source, target = f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/out:1"
    assert main(["image", "optimize", source, target, "--prefetch", "/", "--hot-blob"]) == 0
    stored = Layout(tmp_path / "out").image(None, machine_platform())
    assert len(stored.manifest.layers) == len(stored.config["rootfs"]["diff_ids"]) == 2
    assert [step.get("empty_layer", False) for step in stored.config["history"]] == [
        True,
        False,
        False,
    ]
    assert main(["image", "check", target]) == 0


def test_hot_chunks_that_are_damaged_are_not_copied(image, trace, tmp_path, capsys):
    """The source's bytes are verified before they get another name."""
    path = tmp_path / "image" / "blobs" / "sha256" / image["blobs"][0]["id"]
    path.write_bytes(b"\0" * path.stat().st_size)
    words = [f"oci:{tmp_path}/image:1", f"oci:{tmp_path}/out:1", "--trace", str(trace)]
    assert main(["image", "optimize", *words, "--hot-blob"]) == 1
    assert "zstd" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["{image}", "{out}"], 2, "neither --trace nor --prefetch"),
        (["{image}", "{out}", "--trace", "{tmp}/none"], 3, "no such file"),
        (["{image}", "{out}", "--trace", "{tmp}/root/zz"], 1, "not a trace"),
        (["{image}", "{out}", "--trace", "{tmp}/nameless"], 1, "names no files"),
        (["{image}", "{out}", "--trace", "{tmp}/strange"], 1, "nothing of the trace"),
        (["{image}", "{out}", "--prefetch", "/nowhere"], 1, "/nowhere"),
        (["{image}", "Not A Reference", "--prefetch", "/zz"], 2, "names no image"),
        (["oci:{tmp}/none", "{out}", "--prefetch", "/zz"], 1, "oci-layout"),
        (["{tmp}/root", "{out}", "--prefetch", "/zz"], 2, "names no image"),
    ],
)
def test_wrong_usage_says_so(image, tmp_path, capsys, words, status, message):
    """One line that says what to do, and the status for whose mistake it is."""
    other = Trace("0" * 64, "", 1, (Access("0" * 64, 0, 4096, 0.0),))
    (tmp_path / "nameless").write_bytes(encode(other))
    strange = trace_of(bootstrap_of(tmp_path / "image"), b"/zz")
    nowhere = tuple(use._replace(path=b"/nowhere") for use in strange.files)
    (tmp_path / "strange").write_bytes(encode(strange._replace(accesses=(), files=nowhere)))
    known = {"image": f"oci:{tmp_path}/image:1", "out": f"oci:{tmp_path}/out", "tmp": tmp_path}
    assert main(["image", "optimize", *(word.format_map(known) for word in words)]) == status
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.skipif(PROGRAM is None, reason="docker-registry is missing: install docker-registry")
def test_within_a_registry_only_the_bootstrap_travels(root, trace, tmp_path, capsys):
    """Another tag of the repository costs neither a download nor an upload of a blob; another
    repository has to have the blobs already."""
    with docker_registry(tmp_path / "registry") as registry:
        source, target = f"{registry.host}/some/image:1", f"{registry.host}/some/image:1-hot"
        assert main(["image", "convert", str(root), source, "-o", "json"]) == 0
        blob_id = json.loads(capsys.readouterr().out)["blobs"][0]["id"]
        assert main(["image", "optimize", source, target, "--trace", str(trace)]) == 0
        assert "come first" in capsys.readouterr().out
        request = urllib.request.Request(
            f"http://{registry.host}/v2/some/image/manifests/1-hot",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        )
        with urllib.request.urlopen(request) as answer:
            layers = json.load(answer)["layers"]
        assert layers[0]["digest"] == f"sha256:{blob_id}"
        gets = [each for each in registry.accesses(1, blob_id) if each.method == "GET"]
        assert gets == []
        other = f"{registry.host}/other/image:1"
        assert main(["image", "optimize", source, other, "--trace", str(trace)]) == 1
        assert "is not in that repository" in capsys.readouterr().err
        words = [source, f"oci:{tmp_path}/out", "--trace", str(trace)]
        assert main(["image", "optimize", *words]) == 2
        assert main(["image", "optimize", f"{registry.host}/no/image:1", other, *words[2:]]) == 1
        assert "pull failed" in capsys.readouterr().err.splitlines()[-1]
        layout = f"oci:{tmp_path}/layout:1"
        assert main(["image", "convert", str(root), layout]) == 0
        hot = ["--trace", str(trace), "--hot-blob"]
        assert main(["image", "optimize", source, target, *hot]) == 2
        assert main(["image", "optimize", layout, other, *hot]) == 0
