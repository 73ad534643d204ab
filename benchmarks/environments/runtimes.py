"""Images of language runtimes, from Debian's packages: each as people pull it and as RAFS; kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from harness import command, debian, disk, image, registry, store
from harness.apt import codename
from harness.content import difference
from harness.disk import Disk

from environments import ROOT
from rafs_v6.oci import CONFIG, MANIFEST, TAR_GZIP, Descriptor, Layout, Manifest, Platform

TAG = "latest"

SERVER = """\
import http.server
import json

import numpy
import pandas
import scipy.linalg
import scipy.optimize
import scipy.stats


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        numbers = numpy.arange(1.0, 17.0).reshape(4, 4)
        frame = pandas.DataFrame(scipy.linalg.expm(numbers / 100)).describe()
        body = json.dumps(frame.loc["mean"].tolist()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 8000), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class Runtime:
    """What an image has above Debian's essential set: packages, without the paths in `exclude`, in
    one layer, files in another."""

    packages: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


COMPILERS = (
    *("/usr/include/*", "/usr/lib/gcc/*", "/usr/lib/*.a", "/usr/bin/*-lto-dump-*"),
    "/usr/lib/x86_64-linux-gnu/*san.so.*",
)
"""scipy's package depends on a compiler, two thirds of what it brings. Nobody who serves wants it
in an image; with it the full pull would only be longer."""

RUNTIMES = {
    "python": Runtime(("python3",)),
    "node": Runtime(("nodejs",)),
    "science": Runtime(
        ("python3", "python3-numpy", "python3-scipy", "python3-pandas"),
        COMPILERS,
        {"app/server.py": SERVER},
    ),
    "ruby": Runtime(("ruby",)),
    "rust": Runtime(("rustc",)),
}

KEPT = 2 * len(RUNTIMES)
RECIPE = 1
"""Counts how images of layers were made: another number makes them anew."""


@dataclass(frozen=True)
class Published:
    """An image in a registry's storage on a disk of its own, under two tags of one name.

    `pulled_bytes` is what a full pull moves, `lazy_bytes` what the blobs of its RAFS form take, and
    `content_bytes` what they hold. `digests` names everything a lazy pull may ask for.
    """

    name: str
    disk: Disk
    pulled_bytes: int
    lazy_bytes: int
    content_bytes: int
    digests: list[str]

    @property
    def layers_tag(self) -> str:
        """The image of compressed archives."""
        return f"{self.name}:layers"

    @property
    def rafs_tag(self) -> str:
        """The same files as RAFS v6."""
        return f"{self.name}:rafs"


def published(name: str) -> Published:
    """The image of a runtime at its origin. Made in about a minute; raises CommandFailed."""
    oci = _oci(name)
    key = store.key(oci.name, image.converter(), RECIPE)
    kept = store.kept("runtimes", key, lambda directory: _publish(directory, name, oci), keep=KEPT)
    figures = json.loads((kept / "figures.json").read_text())
    storage = Disk(kept / "registry.ext4", f"origin-{name}", f"{registry.STORAGE}-{name}")
    return Published(name, storage, **figures)


# -- an image of layers ---------------------------------------------------------------------------


def _oci(name: str) -> Path:
    """An image layout with the runtime's image in it, kept."""
    base = _base()

    def build(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _layout(directory, _layers(RUNTIMES[name], base, Path(scratch)))

    key = store.key(base.name, RUNTIMES[name], RECIPE)
    return store.kept("oci", f"{name}-{key}", build, keep=KEPT)


def _base() -> Path:
    """The lowest layer of all, kept."""
    key = store.key(codename(), debian.RELEASE, debian.UNREAD)
    return store.kept("base", key, lambda tree: debian.make(tree, (), debian.UNREAD), keep=1)


def _layers(runtime: Runtime, base: Path, scratch: Path) -> list[Path]:
    full = scratch / "full"
    debian.make(full, runtime.packages, (*debian.UNREAD, *runtime.exclude))
    difference(base, full, scratch / "packages")
    shutil.rmtree(full)
    if not runtime.files:
        return [base, scratch / "packages"]
    for path, text in runtime.files.items():
        target = scratch / "files" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return [base, scratch / "packages", scratch / "files"]


def _layout(directory: Path, layers: list[Path]) -> None:
    layout = Layout(directory, create=True)
    archives = [_archive(layout, layer, directory / "layer.tar") for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in archives]},
    }
    described = layout.add(msgspec.json.encode(config), CONFIG)
    manifest = Manifest(described, tuple(blob for _, blob in archives), 2, MANIFEST)
    layout.name(layout.add(msgspec.json.encode(manifest), MANIFEST), TAG)


def _archive(layout: Layout, layer: Path, archive: Path) -> tuple[str, Descriptor]:
    """A directory as a layer: its diff id and its blob, by gzip as most in registries are."""
    attributes = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    command.run(
        ["tar", "-C", layer, "--sort=name", "--format=pax", *attributes, "-cf", archive, "."]
    )
    diff_id = _digest(archive)
    command.run(["gzip", "-n", archive])
    packed = archive.with_name(f"{archive.name}.gz")
    blob = Descriptor(TAR_GZIP, _digest(packed), packed.stat().st_size)
    with layout.stage() as staged, packed.open("rb") as file:
        shutil.copyfileobj(file, staged)
        layout.keep(staged, blob)
    packed.unlink()
    return diff_id, blob


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


# -- at its origin --------------------------------------------------------------------------------


def _publish(directory: Path, name: str, oci: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as storage:
        with registry.on_host(Path(storage)) as address:
            source, target = f"oci:{oci}:{TAG}", f"{address}/{name}"
            pushed = ["--dest-tls-verify=false", source, f"docker://{target}:layers"]
            command.run(["skopeo", "copy", "--quiet", "--insecure-policy", *pushed])
            convert = ["-m", "fscached", "image", "convert", "-o", "json", source]
            summary = json.loads(
                command.run([sys.executable, *convert, f"{target}:rafs"], cwd=ROOT)
            )
        disk.from_tree(directory / "registry.ext4", Path(storage))
    (directory / "figures.json").write_text(json.dumps(_figures(oci, summary)))


def _figures(oci: Path, summary: image.Summary) -> dict[str, object]:
    manifest = Layout(oci).image(TAG, Platform("amd64", "linux")).manifest
    return {
        "pulled_bytes": sum(layer.size for layer in manifest.layers),
        "lazy_bytes": sum(blob["compressed_bytes"] for blob in summary["blobs"]),
        "content_bytes": sum(blob["uncompressed_bytes"] for blob in summary["blobs"]),
        "digests": [layer["digest"] for layer in summary["layers"]],
    }
