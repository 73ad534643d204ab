"""Mounts: what is asked of the kernel, what its refusals are turned into, the mount table.

Stand-in: recorded calls in place of `cdefs.mount`, which needs root and an EROFS with on-demand
mode; the context log's texts are those of a 6.18 kernel without it. The real calls are in
`tests/cdefs` and `vm-tests/`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.transport import ObjectKey, mount
from fscached.transport.mount import Mount, MountError


class Calls:
    """`cdefs.mount`, refusing where told; a context's log is a pipe."""

    def __init__(self, refuse: dict[str, int], log: list[str]) -> None:
        self.seen: list[str] = []
        self._refuse = refuse
        self._log = log

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object, **options: object) -> int:
            self.seen.append(" ".join(map(str, (name, *arguments, *options.values()))))
            last = " ".join([name, *map(str, arguments[-1:])])
            if code := self._refuse.get(name) or self._refuse.get(last):
                raise OSError(code, f"{name}: {os.strerror(code)}")
            return self._descriptor() if name in {"fsopen", "fsmount", "open_tree_clone"} else 0

        return call

    def _descriptor(self) -> int:
        reader, writer = os.pipe()
        for line in self._log:
            os.write(writer, line.encode())
        os.close(writer)
        return reader


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Puts a kernel in place that says `log` and refuses each named call with its errno."""

    def make(log: list[str] | None = None, **refuse: int) -> Calls:
        calls = Calls(refuse, log or [])
        monkeypatch.setattr(mount, "mount", calls)
        return calls

    return make


def open_descriptors() -> int:
    """Fewer a moment later is no wonder: what earlier tests left is collected at any time."""
    return len(os.listdir("/proc/self/fd"))


def test_an_image_is_mounted_read_only(kernel: Callable[..., Calls]) -> None:
    """The options EROFS knows, then the mount, then its place; no descriptor stays."""
    calls, before = kernel(), open_descriptors()
    mount.mount_fsid("/target", "image", "domain")
    steps = [call.split()[0] for call in calls.seen]
    assert steps == [
        *("fsopen", "fsconfig_set_string", "fsconfig_set_string", "fsconfig_set_flag"),
        *("fsconfig_create", "fsmount", "move_mount"),
    ]
    assert calls.seen[1].endswith(" domain_id domain") and calls.seen[2].endswith(" fsid image")
    assert calls.seen[3].endswith(" ro") and calls.seen[6].endswith(" /target")
    assert open_descriptors() <= before


def test_without_a_domain_none_is_set(kernel: Callable[..., Calls]) -> None:
    """Images of no domain share nothing."""
    calls = kernel()
    mount.mount_fsid("/target", "image")
    assert "domain_id" not in " ".join(calls.seen)


@pytest.mark.parametrize(
    ("step", "code", "remedy"),
    [
        ("fsopen", errno.ENODEV, "load the erofs module"),
        ("fsopen", errno.EPERM, "as root"),
        ("fsconfig_create", errno.EBUSY, "bind-mount"),
        ("fsconfig_create", errno.EEXIST, "bind-mount"),
        ("fsconfig_create", errno.ENOENT, "register"),
        ("fsconfig_create", errno.ENOBUFS, "fscached doctor"),
        ("fsconfig_create", errno.EIO, "daemon's log"),
        ("fsconfig_create", errno.EINVAL, "RAFS v6"),
        ("fsconfig_create", errno.ENOTBLK, "plain files"),
        ("fsconfig_create", errno.ENOLINK, "dmesg"),
        ("move_mount", errno.ENOENT, "create the directory"),
        ("move_mount", errno.ENOTDIR, "on a directory"),
    ],
)
def test_a_refusal_says_what_to_do(
    kernel: Callable[..., Calls], step: str, code: int, remedy: str
) -> None:
    """The same errno means another thing at another step."""
    kernel(None, **{step: code})
    before = open_descriptors()
    with pytest.raises(MountError, match=remedy) as caught:
        mount.mount_fsid("/target", "image")
    assert caught.value.errno == code
    assert "mounting image on /target" in caught.value.what
    assert os.strerror(code) in caught.value.what
    assert open_descriptors() <= before


def test_the_kernels_own_words_are_in_the_error(kernel: Callable[..., Calls]) -> None:
    """An EROFS without on-demand mode takes the option, says so in its log, and fails later."""
    log = ["e erofs: fsid option not supported\n"]
    kernel(log, fsconfig_create=errno.EINVAL)
    with pytest.raises(MountError, match="scripts/kernel-modules") as caught:
        mount.mount_fsid("/target", "image")
    assert "; erofs: fsid option not supported" in caught.value.what


@pytest.mark.parametrize("name", ["", "a/b", "a,b", "a\0b", "a\nb", "a\\b", "..", "x" * 201])
def test_names_that_are_options_or_paths_are_refused(
    kernel: Callable[..., Calls], name: str
) -> None:
    """Nothing is asked of the kernel with a name it would read otherwise."""
    calls = kernel()
    with pytest.raises(MountError, match="fsid"):
        mount.mount_fsid("/target", name)
    if name:
        with pytest.raises(MountError, match="domain_id"):
            mount.mount_fsid("/target", "image", name)
    assert calls.seen == []


def test_a_mount_point_is_absolute(kernel: Callable[..., Calls]) -> None:
    """A daemon's working directory is nobody's idea of a place."""
    calls = kernel()
    for call in (lambda: mount.mount_fsid("target", "image"), lambda: mount.bind("/a", "b")):
        with pytest.raises(MountError, match="absolute"):
            call()
    assert calls.seen == []


def test_bind_and_unmount(kernel: Callable[..., Calls]) -> None:
    """A second mount point is a clone of the first; lazy is detach."""
    calls = kernel()
    mount.bind("/first", "/second")
    mount.unmount("/second")
    mount.unmount("/first", lazy=True)
    assert calls.seen[0] == "open_tree_clone /first"
    assert calls.seen[1].startswith("move_mount ") and calls.seen[1].endswith(" /second")
    assert calls.seen[2:] == ["umount /second False", "umount /first True"]


def test_unmounting_says_what_is_wrong(kernel: Callable[..., Calls]) -> None:
    """In use, or nothing there."""
    kernel(umount=errno.EBUSY)
    with pytest.raises(MountError, match="unmount lazily"):
        mount.unmount("/target")
    kernel(umount=errno.EINVAL)
    with pytest.raises(MountError, match="nothing is mounted"):
        mount.unmount("/target")


MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
90 27 0:52 / /mnt/with\040blank ro,relatime shared:9 - erofs none ro,fsid=abc,domain_id=dom,user_xattr
91 27 0:52 / /mnt/second ro,relatime shared:9 master:1 - erofs none ro,fsid=abc,domain_id=dom
92 27 0:53 / /mnt/alone ro,relatime - erofs none ro,fsid=def
93 27 7:0 / /mnt/loop ro,relatime - erofs /dev/loop0 ro,user_xattr
94 27 0:54 / /mnt/o rw - overlay overlay rw,lowerdir=/a\054b:/mnt/alone,upperdir=/u,workdir=/w
""".lstrip()  # noqa: E501


def test_mounted_images_are_found(tmp_path: Path) -> None:
    """EROFS with a fsid is one of ours; bind mounts share its device; blanks are octal."""
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    assert mount.mounted(path) == [
        Mount("abc", "dom", "/mnt/with blank", "0:52"),
        Mount("abc", "dom", "/mnt/second", "0:52"),
        Mount("def", "", "/mnt/alone", "0:53"),
    ]


def test_images_mounted_from_files_are_found(tmp_path: Path) -> None:
    """By their bootstrap below a state directory; other EROFS files are not ours."""
    fsid, path = "5a" * 32, tmp_path / "mountinfo"
    source = f"/var/lib/fscached/state/images/{fsid}/image.boot"
    path.write_text(
        f"65 44 0:39 / /mnt/image ro,relatime - erofs {source} ro,user_xattr\n"
        "66 44 0:40 / /mnt/other ro,relatime - erofs /srv/images/some/image.boot ro\n"
    )
    assert mount.mounted(path) == [Mount(fsid, "", "/mnt/image", "0:39", source)]


def test_an_image_is_mounted_from_files(kernel: Callable[..., Calls]) -> None:
    """The bootstrap, and the blobs in the order of its device table."""
    calls = kernel()
    mount.mount_files("/target", "/state/image.boot", ["/cache/b", "/cache/a"])
    options = [call.split()[2:] for call in calls.seen if "set_string" in call]
    assert options == [
        ["source", "/state/image.boot"],
        ["device", "/cache/b"],
        ["device", "/cache/a"],
    ]
    with pytest.raises(MountError, match="absolute"):
        mount.mount_files("target", "/state/image.boot", [])


def test_pages_are_not_kept_twice_where_the_kernel_can(kernel: Callable[..., Calls]) -> None:
    """Direct I/O is wished for: a kernel that does not know it mounts without, and what it said of
    that is in no later error."""
    calls = kernel()
    mount.mount_files("/target", "/state/image.boot", [])
    assert [call.split()[-1] for call in calls.seen if "set_flag" in call] == ["ro", "directio"]
    log = ["e erofs: Unknown parameter 'directio'\n"]
    calls = kernel(log, **{"fsconfig_set_flag directio": errno.EINVAL})
    mount.mount_files("/target", "/state/image.boot", [])
    assert "move_mount" in calls.seen[-1]
    refused = {"fsconfig_set_flag directio": errno.EINVAL, "fsconfig_create": errno.EINVAL}
    kernel(log, **refused)
    with pytest.raises(MountError) as caught:
        mount.mount_files("/target", "/state/image.boot", [])
    assert "directio" not in str(caught.value)


def test_a_mount_from_files_reads_ahead_further(
    kernel: Callable[..., Calls], tmp_path: Path
) -> None:
    """What appears with the mount is set, what was there before is left alone."""

    def appear(name: str) -> Path:
        path = tmp_path / name / "read_ahead_kb"
        path.parent.mkdir()
        path.write_text("128")
        return path

    calls, other = kernel(), appear("erofs-1")
    made: list[Path] = []
    calls.fsmount = lambda _context: made.append(appear("erofs-2")) or os.open("/", os.O_PATH)
    mount.mount_files("/target", "/state/image.boot", [], tmp_path)
    assert (other.read_text(), made[0].read_text()) == ("128", str(mount.READ_AHEAD_KIB))


# Both tables of a 6.1 whose daemon was stopped under one mount; another daemon, another mount.
VOLUMES = """\
VOLUME   REF   nCOOK ACC FL CACHE           KEY
======== ===== ===== === == =============== ================
00000002     6     5   1 00 fscached        erofs,dom
00000003     1     1   0 00 -               nfs,4.2,10.0.0.1
"""
COOKIES = """\
COOKIE   VOLUME   REF ACT ACC S FL DEF
======== ======== === === === = == ================
00000005 00000002   1   1   0 - 402c 62616161
00000006 00000002   1   0   0 - 402c 62616162
00000007 00000002   2   1   0 A 4124 62616163, 00ff
00000008 00000003   1   1   0 - 402c 62616164
00000009 00000002   1   1   0 - 402c 62616165, 00ff
0000000a 00000009   1   1   0 - 402c 62616166
0000000b 00000002   1   1   0 -
"""


def test_dead_objects_are_found(tmp_path: Path) -> None:
    """Those of EROFS that are in use although no cache has them."""
    (tmp_path / "volumes").write_text(VOLUMES)
    (tmp_path / "cookies").write_text(COOKIES)
    assert mount.dead(tmp_path) == {ObjectKey("dom", "baaa"), ObjectKey("dom", "baae")}


def test_without_fscache_nothing_is_dead(tmp_path: Path) -> None:
    """A kernel whose modules are not loaded has no such tables."""
    assert mount.dead(tmp_path) == frozenset()


def test_options_are_split_before_they_are_unescaped(tmp_path: Path) -> None:
    """A comma in a path is no new option."""
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTINFO)
    assert mount.mount_points(path)[-1].options[1] == ("lowerdir", "/a,b:/mnt/alone")


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_mount_point_is_read_back(name: bytes) -> None:
    """The kernel's escaping of blanks, tabs, line ends, backslashes and # is undone."""
    escaped = b"".join(b"\\%03o" % c if c in b" \t\n\\#" else bytes([c]) for c in name)
    line = b"1 2 0:5 / /" + escaped + b" rw - tmpfs none rw"
    assert os.fsencode(mount._mount_point(line).target) == b"/" + name


def test_a_carriage_return_ends_no_line(tmp_path: Path) -> None:
    """The kernel does not escape it."""
    path = tmp_path / "mountinfo"
    path.write_bytes(b"1 2 0:5 / /a\rb rw - tmpfs none rw\n")
    assert [point.target for point in mount.mount_points(path)] == ["/a\rb"]


def test_this_machines_mount_table_is_read() -> None:
    """Whatever is mounted here, /proc is among it."""
    assert ("/proc", "proc") in {(point.target, point.fs_type) for point in mount.mount_points()}


@pytest.mark.parametrize(("tags", "apart"), [("", False), ("shared:1", False), ("master:1", True)])
def test_a_namespace_that_follows_another_is_told(tmp_path: Path, tags: str, apart: bool) -> None:
    """As systemd makes one for ProtectSystem=: what is unmounted there stays mounted elsewhere."""
    table = tmp_path / "mountinfo"
    table.write_text(
        f"22 1 254:0 / / rw,relatime {tags} - ext4 /dev/vda rw\n"
        "23 22 0:21 / /proc rw master:9 - proc proc rw\n".replace("  ", " ")
    )
    assert mount.is_apart(table) is apart
