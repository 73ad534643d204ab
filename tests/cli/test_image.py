"""`fscached image`, as people call it."""

import hashlib
import json
import urllib.request

import pytest

from fscached.cli import main
from tests.source.docker_registry import PROGRAM, docker_registry


@pytest.fixture
def root(tmp_path):
    """A directory to make an image of."""
    directory = tmp_path / "root"
    (directory / "etc").mkdir(parents=True)
    (directory / "etc" / "hostname").write_text("box\n" * 3000)
    (directory / "top").write_bytes(bytes(range(256)))
    return directory


def test_directory_to_layout_and_check(root, tmp_path, capsys):
    """A directory becomes an image in a layout that check finds nothing wrong with."""
    target = f"oci:{tmp_path}/image:v1"
    assert main(["image", "convert", str(root), target, "-o", "json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert [blob["chunks"] for blob in summary["blobs"]] == [2]
    assert len(summary["layers"]) == 2
    assert "layer 1/1" in err
    assert main(["image", "check", target]) == 0
    assert "nothing wrong" in capsys.readouterr().out


def test_damage_is_found(root, tmp_path, capsys):
    """Findings are listed, one per line or as JSON, and the status is 1."""
    target = f"oci:{tmp_path}/image"
    main(["image", "convert", str(root), target, "--compressor", "none", "-o", "json"])
    blob_id = json.loads(capsys.readouterr().out)["blobs"][0]["id"]
    layout = tmp_path / "image" / "blobs" / "sha256"
    (tmp_path / "image.boot").write_bytes(_bootstrap(tmp_path / "image"))
    damaged = bytearray((layout / blob_id).read_bytes())
    damaged[0] ^= 1
    (tmp_path / blob_id).write_bytes(damaged)
    assert main(["image", "check", str(tmp_path / "image.boot")]) == 1
    assert blob_id[:12] in capsys.readouterr().out
    assert main(["image", "check", str(tmp_path / "image.boot"), "-o", "json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["problem"]
    (layout / blob_id).write_bytes(damaged)
    assert main(["image", "check", target]) == 1
    assert "is damaged" in capsys.readouterr().err


def _bootstrap(layout):
    from fscached.cli._layout import machine_platform
    from fscached.store import unpack_bootstrap
    from rafs_v6.oci import Layout

    opened = Layout(layout)
    with opened.open(opened.image(None, machine_platform()).manifest.layers[-1]) as file:
        return unpack_bootstrap(file.read())


def test_layout_to_layout(root, tmp_path, capsys):
    """An OCI image of two tar layers is converted, and the same image comes of it again."""
    from fscached.cli._layout import machine_platform
    from rafs_v6.oci import Layout
    from tests.rafs_v6.test_archive import entry, tar
    from tests.rafs_v6.test_oci import stored_image

    source = Layout(tmp_path / "source", create=True)
    archive = tar((entry("etc/hosts"), b"localhost"))
    source.name(stored_image(source, machine_platform(), archive), "v1")
    digests = []
    for _ in range(2):
        assert (
            main(
                [
                    "image",
                    "convert",
                    f"oci:{tmp_path}/source:v1",
                    f"oci:{tmp_path}/out",
                    "-o",
                    "json",
                ]
            )
            == 0
        )
        digests.append(json.loads(capsys.readouterr().out)["digest"])
    assert digests[0] == digests[1]


def test_layers_option_stacks_directories(root, tmp_path, capsys):
    """--layer, lowest first; data that is there already is not stored again."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper" / "copy").write_bytes((root / "top").read_bytes())
    (tmp_path / "upper" / "new").write_text("new")
    arguments = ["--layer", str(root), "--layer", str(tmp_path / "upper")]
    assert main(["image", "convert", *arguments, f"oci:{tmp_path}/image", "-o", "json"]) == 0
    assert [blob["chunks"] for blob in json.loads(capsys.readouterr().out)["blobs"]] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{root}", "oci:{tmp}/x", "--chunk-size", "5K"], 1, "power of two"),
        (["{root}", "oci:{tmp}/x", "--chunk-size", "many"], 2, "no size"),
        (["{root}", "oci:{tmp}/x", "--compressor", "gzip"], 2, "--help"),
        (["{root}", "oci:{tmp}/x", "--platform", "linux"], 2, "linux/amd64"),
        (["{root}", "oci:{tmp}/x", "--layer", "{root}"], 2, "one of them"),
        (["oci:{tmp}/x"], 2, "one of them"),
        (["{tmp}/nothing", "oci:{tmp}/x"], 3, "nothing"),
        (["oci:{tmp}/nothing", "oci:{tmp}/x"], 1, "oci-layout"),
        (["{root}", "Not A Reference"], 2, "names no image"),
    ],
)
def test_wrong_usage_says_so(root, tmp_path, capsys, arguments, status, message):
    """One line that says what to do, and the status for whose mistake it is."""
    arguments = [each.format(root=root, tmp=tmp_path) for each in arguments]
    assert main(["image", "convert", *arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_check_of_nothing_is_a_missing_precondition(tmp_path, capsys):
    """A path that is not there is told apart from a bad image."""
    assert main(["image", "check", str(tmp_path / "nothing")]) == 3


@pytest.mark.skipif(PROGRAM is None, reason="docker-registry is missing: install docker-registry")
def test_push_to_a_registry(root, tmp_path, capsys):
    """The image is in the registry under its tag, blobs under their ids, and pushing it again
    sends nothing but the manifest."""
    with docker_registry(tmp_path / "registry") as registry:
        target = f"{registry.host}/some/image:v1"
        for _ in range(2):
            assert main(["image", "convert", str(root), target, "-o", "json"]) == 0
            summary = json.loads(capsys.readouterr().out)
        base = f"http://{registry.host}/v2/some/image"
        request = urllib.request.Request(
            f"{base}/manifests/v1",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        )
        with urllib.request.urlopen(request) as answer:
            manifest = answer.read()
        assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == summary["digest"]
        blob_id = summary["blobs"][0]["id"]
        with urllib.request.urlopen(f"{base}/blobs/sha256:{blob_id}") as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == blob_id
        begun = registry.accesses(3, "/blobs/uploads/")
        assert sum(access.method == "POST" for access in begun) == 3


def test_push_to_nobody_fails_with_a_reason(root, tmp_path, capsys):
    """Nobody listens: one line, no traceback."""
    config = tmp_path / "config.toml"
    config.write_text("[source]\nretries = 0\n")
    arguments = [str(root), "127.0.0.1:1/some/image:v1", "--config", str(config)]
    assert main(["image", "convert", *arguments]) == 1
    assert "push failed" in capsys.readouterr().err


def test_bars_show_what_lines_show(root, tmp_path, capsys, monkeypatch):
    """On a terminal a bar moves below the same lines."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["image", "convert", str(root), f"oci:{tmp_path}/image"]) == 0
    error = capsys.readouterr().err
    assert "layer 1/1" in error
    assert "2 chunks" in error
