"""Every precondition is broken once, on a machine made of files.

The machine is a stand-in: a /proc, /boot and /lib/modules in a temporary directory.
"""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fscached.config import Cache, Fetch, Kernel
from fscached.transport import probe
from fscached.transport.mount import mount_points
from fscached.transport.probe import Finding, Holder, Host

CACHEFILES = Kernel(transport="cachefiles")
RELEASE = "6.1.0-1-test"
SYMBOLS = """\
0000000000000000 T cachefiles_add_cache\t[cachefiles]
0000000000000000 T __traceiter_cachefiles_ondemand_copen\t[cachefiles]
0000000000000000 T cachefiles_ondemand_copen\t[cachefiles]
0000000000000000 T cachefiles_ondemand_restore\t[cachefiles]
0000000000000000 T erofs_register_sysfs\t[erofs]
0000000000000000 T erofs_fscache_register_fs\t[erofs]
"""


def space(**changes: int) -> Callable[[str], os.statvfs_result]:
    state = {"f_bsize": 4096, "f_blocks": 1000, "f_bavail": 500, "f_files": 1000, "f_ffree": 500}
    return lambda _: SimpleNamespace(**(state | changes))  # type: ignore[return-value]


class Machine:
    """A machine on which images can be mounted, until something is taken away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = Cache(directory=str(root / "cache"))
        (root / "cache").mkdir()
        self.write("proc/self/status", "CapEff:\t000001ffffffffff\n")
        self.write("proc/sys/fs/nr_open", "1048576\n")
        self.write("proc/sys/kernel/hung_task_timeout_secs", "120\n")
        self.write("proc/sys/kernel/hung_task_panic", "0\n")
        self.write("proc/self/uid_map", "         0          0 4294967295\n")
        self.mounts("1 0 8:1 / / rw - ext4 /dev/sda1 rw")
        self.write("proc/kallsyms", SYMBOLS)
        self.write("proc/modules", "erofs 1 0 - Live 0x0\ncachefiles 1 0 - Live 0x0\n")
        self.write(f"modules/{RELEASE}/modules.dep", "kernel/fs/cachefiles/cachefiles.ko:\n")
        self.host = Host(
            release=RELEASE,
            page_bytes=4096,
            descriptors_max=100_000,
            trial=lambda _: "",
            group=lambda _: "",
            statvfs=space(),
            device=Path("/dev/null"),
            proc=root / "proc",
            boot=root / "boot",
            modules=root / "modules",
        )

    def write(self, path: str, text: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)

    def mounts(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "\n".join(lines) + "\n")

    def process(self, pid: int, comm: str, *targets: str) -> None:
        self.write(f"proc/{pid}/comm", f"{comm}\n")
        (self.root / f"proc/{pid}/fd").mkdir()
        for number, target in enumerate(targets):
            (self.root / f"proc/{pid}/fd/{number}").symlink_to(target)

    def without(self, symbol: str) -> None:
        lines = SYMBOLS.splitlines()
        kept = [line for line in lines if symbol not in line]
        self.write("proc/kallsyms", "\n".join(kept))

    def change(self, **fields: object) -> None:
        self.host = replace(self.host, **fields)  # type: ignore[arg-type]

    def missing(self, *paths: str) -> dict[str, Finding]:
        findings = probe.survey(self.host, self.cache, CACHEFILES, paths)
        assert all(bool(finding.remedy) != finding.ok for finding in findings)
        return {finding.name: finding for finding in findings if not finding.ok}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_good_machine_lacks_nothing(machine: Machine) -> None:
    """Every precondition is looked at and met."""
    assert machine.missing() == {}
    names = [finding.name for finding in probe.survey(machine.host, machine.cache, CACHEFILES)]
    assert len(names) == len(set(names)) == 15


def without_capability(machine: Machine) -> None:
    machine.write("proc/self/status", "CapEff:\t00000000a80425fb\n")


def in_a_user_namespace(machine: Machine) -> None:
    machine.write("proc/self/uid_map", "0 100000 65536\n")


def few_descriptors(machine: Machine) -> None:
    machine.write("proc/sys/fs/nr_open", "4096\n")
    machine.change(descriptors_max=4096)


def no_device(machine: Machine) -> None:
    machine.change(device=machine.root / "cachefiles")


def no_device_nor_module(machine: Machine) -> None:
    no_device(machine)
    machine.write("proc/kallsyms", SYMBOLS.replace("cachefiles_", "x_"))


def a_file_for_a_device(machine: Machine) -> None:
    machine.write("cachefiles", "")
    no_device(machine)


def busy_device(machine: Machine) -> None:
    machine.process(812, "cachefilesd", "/etc/passwd", "/dev/null")


def pinned_cache(machine: Machine) -> None:
    machine.process(77, "nydusd", "anon_inode:[cachefiles]", "anon_inode:[cachefiles]")


def cachefiles_without_ondemand(machine: Machine) -> None:
    machine.without("cachefiles_ondemand")


def erofs_without_ondemand(machine: Machine) -> None:
    machine.without("erofs_fscache")


def erofs_built_in(machine: Machine) -> None:
    erofs_without_ondemand(machine)
    machine.write("proc/modules", "")


def no_restore(machine: Machine) -> None:
    machine.without("restore")


def a_file_for_a_directory(machine: Machine) -> None:
    machine.write("file", "")
    machine.cache = Cache(directory=f"{machine.root}/file/cache")


def relative_cache_directory(machine: Machine) -> None:
    machine.cache = Cache(directory="cache")


def cache_on_tmpfs(machine: Machine) -> None:
    machine.mounts(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        f"2 1 0:9 / {machine.root}/cache rw - tmpfs none rw",
    )


def cache_in_an_image(machine: Machine) -> None:
    machine.mounts(f"2 1 0:9 / {machine.root} ro - erofs none ro,fsid=abc")


@pytest.mark.parametrize(
    ("broken", "name", "found", "remedy"),
    [
        (without_capability, "privilege", "no CAP_SYS_ADMIN", "as root"),
        (in_a_user_namespace, "privilege", "user namespace", "outside of user namespaces"),
        (lambda m: m.change(release="5.15.0-91"), "kernel", "5.15.0-91", "5.19 or newer"),
        (lambda m: m.change(release="7.2.1"), "kernel", "7.2.1", "7.1 or older"),
        (lambda m: m.change(release="odd"), "kernel", "odd", "5.19 or newer"),
        (lambda m: m.change(page_bytes=65536), "page-size", "65536", "pages of 4 KiB"),
        (no_device, "device", "no /", "the module is loaded"),
        (a_file_for_a_device, "device", "is no device", "modprobe"),
        (busy_device, "device-free", "pid 812 (cachefilesd: the device)", "stop that process"),
        (pinned_cache, "device-free", "pid 77 (nydusd: an object)", "stop that process"),
        (cachefiles_without_ondemand, "cachefiles-ondemand", "without", "scripts/kernel-modules"),
        (erofs_without_ondemand, "erofs-ondemand", "without", "scripts/kernel-modules"),
        (erofs_built_in, "erofs-ondemand", "without", "CONFIG_EROFS_FS_ONDEMAND"),
        (no_restore, "restore", "takes its mounts along", "6.8"),
        (few_descriptors, "descriptors", "4096", "LimitNOFILE=19456"),
        (a_file_for_a_directory, "cache-directory", "file is no directory", "[cache]"),
        (relative_cache_directory, "cache-directory", "cache", "absolute"),
        (cache_on_tmpfs, "cache-file-system", "tmpfs", "ext4, xfs or btrfs"),
        (
            lambda m: m.change(trial=lambda _: "no user extended attributes"),
            *("cache-file-system", "ext4: no user extended attributes", "ext4, xfs or btrfs"),
        ),
        (
            lambda m: m.change(statvfs=space(f_bsize=65536)),
            *("cache-file-system", "65536 bytes", "ext4, xfs or btrfs"),
        ),
        (lambda m: m.change(statvfs=space(f_bavail=10)), "free-space", "1 % of blocks", "free"),
        (lambda m: m.change(statvfs=space(f_ffree=9)), "free-space", "0 % of inodes", "free"),
        (cache_in_an_image, "own-files", "lies in the image", "elsewhere"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    machine: Machine, broken: Callable[[Machine], None], name: str, found: str, remedy: str
) -> None:
    """One thing is broken: of what it breaks, its own precondition says so and what to do."""
    broken(machine)
    missing = machine.missing()
    assert found in missing[name].found
    assert remedy in missing[name].remedy
    assert set(missing) <= {name, "restore"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "unknown"),
        ("\nCONFIG_CACHEFILES_ONDEMAND=y\n", "configured"),
        ("\n# CONFIG_CACHEFILES_ONDEMAND is not set\n", "off"),
    ],
)
@pytest.mark.parametrize("place", ["proc/config.gz", f"boot/config-{RELEASE}"])
def test_before_the_module_is_loaded_the_configuration_is_asked(
    machine: Machine, config: str | None, told: str, place: str
) -> None:
    """Without the option it may still be a rebuilt module: loading it tells."""
    no_device_nor_module(machine)
    if config is not None:
        machine.write(place, gzip.compress(config.encode()) if "gz" in place else config)
    missing = machine.missing()
    assert missing["device"].remedy == "modprobe cachefiles"
    assert told in missing["cachefiles-ondemand"].found
    assert missing["cachefiles-ondemand"].remedy.startswith("modprobe cachefiles")
    assert ("scripts/kernel-modules" in missing["cachefiles-ondemand"].remedy) == (
        told != "configured"
    )
    assert missing["restore"].found == "not known yet"
    machine.change(release="6.12.0")
    assert "restore" not in machine.missing()


def test_a_kernel_without_the_module(machine: Machine) -> None:
    """Nothing to load: another kernel is needed."""
    no_device_nor_module(machine)
    machine.write(f"modules/{RELEASE}/modules.dep", "")
    missing = machine.missing()
    assert missing["device"].remedy == "boot a kernel with CONFIG_CACHEFILES"
    assert "CONFIG_CACHEFILES_ONDEMAND" in missing["cachefiles-ondemand"].remedy


def test_our_own_daemon_may_hold_the_device(machine: Machine) -> None:
    """A machine that is being served is a good machine."""
    machine.process(5, "fscached", "/dev/null", "anon_inode:[cachefiles]")
    assert machine.missing() == {}
    held = next(
        f for f in probe.survey(machine.host, machine.cache, CACHEFILES) if f.name == "device-free"
    )
    assert held.found == "held by pid 5 (fscached: the device), pid 5 (fscached: an object)"


def test_this_process_and_vanished_ones_hold_nothing(machine: Machine) -> None:
    """Asking is not holding; a process that ends meanwhile is passed over."""
    machine.process(os.getpid(), "fscached", "/dev/null")
    (machine.root / "proc/99").mkdir()
    machine.process(100, "x", "/dev/null")
    (machine.root / "proc/100/comm").unlink()
    assert probe.holders(machine.host) == [Holder(100, "", "the device")]


def test_nothing_in_an_image_is_touched(machine: Machine) -> None:
    """A cache directory inside an image is judged by its name alone."""

    def touched(_: str) -> str:
        raise AssertionError("touched")

    cache_in_an_image(machine)
    machine.change(trial=touched, statvfs=touched)
    assert set(machine.missing()) == {"own-files"}


MOUNTS = """
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:5 / /images/one ro - erofs none ro,fsid=abc,domain_id=d
3 1 7:0 / /images/loop ro - erofs /dev/loop0 ro
4 1 0:6 / /root rw - overlay overlay rw,lowerdir=/x:/images/one/sub,upperdir=/u,workdir=/w
5 1 0:7 / /new rw - overlay overlay rw,lowerdir+=/y,lowerdir+=/root/z,upperdir=/u,workdir=/w
6 2 0:8 / /images/one/data rw - ext4 /dev/sdb rw
7 1 0:9 / /over ro - erofs none ro,fsid=def
8 7 0:10 / /over rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/", None),
        ("/etc", None),
        ("/images", None),
        ("/images/one", "/images/one"),
        ("/images/one/bin/sh", "/images/one"),
        ("/images/one/../one/x", "/images/one"),
        ("/images/onethousand", None),
        ("/images/loop/x", None),
        ("/images/one/data/x", None),
        ("/root/bin", "/images/one"),
        ("/new/bin", "/images/one"),
        ("/over/x", None),
    ],
)
def test_served_by(tmp_path: Path, path: str, target: str | None) -> None:
    """The mount that shows at a path decides, through overlays down to their layers."""
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS)
    assert probe.served_by(path, mount_points(mountinfo)) == target


def test_the_program_itself_is_among_the_paths(machine: Machine) -> None:
    """Interpreter, library and package are checked without being named."""
    package = Path(probe.__file__).parent.parent
    machine.mounts(f"2 1 0:9 / {package} ro - erofs none ro,fsid=abc")
    assert str(package) in machine.missing()["own-files"].found
    machine.mounts("2 1 0:9 / /etc/fscached ro - erofs none ro,fsid=abc")
    assert "/etc/fscached/x" in machine.missing("/etc/fscached/x")["own-files"].found


@pytest.mark.parametrize(
    ("broken", "code", "words"),
    [
        (no_device, errno.ENOENT, ["no /", "the module is loaded"]),
        (
            busy_device,
            errno.EBUSY,
            ["busy: held by pid 812 (cachefilesd: the device); stop that process"],
        ),
        (lambda m: None, errno.EBUSY, ["no process that can be seen", "other PID namespaces"]),
        (lambda m: None, errno.EPERM, ["as root"]),
        (cachefiles_without_ondemand, errno.EINVAL, ["on-demand", "scripts/kernel-modules"]),
        (lambda m: None, errno.EOPNOTSUPP, ["ext4, xfs or btrfs"]),
        (lambda m: None, errno.EINVAL, ["fscached doctor", "dmesg"]),
    ],
)
def test_a_failed_open_is_explained(
    machine: Machine, broken: Callable[[Machine], None], code: int, words: list[str]
) -> None:
    """What the daemon says when it cannot start: why, and what to do."""
    broken(machine)
    said = probe.explain_open_failure(OSError(code, os.strerror(code)), machine.host)
    assert all(word in said for word in words)


def test_a_cache_directory_that_will_be_made(machine: Machine) -> None:
    """Its file system and space are those of the directory it will be in."""
    asked: list[str] = []

    def trial(path: str) -> str:
        asked.append(path)
        return ""

    machine.cache = Cache(directory=f"{machine.root}/cache/a/b")
    machine.change(trial=trial)
    assert machine.missing() == {}
    assert asked == [f"{machine.root}/cache"]


def test_the_trial_of_a_real_directory(tmp_path: Path) -> None:
    """Nothing is left behind, and a directory without the needed calls says which."""
    lacks = probe.this_host().trial(str(tmp_path))
    assert lacks == "" or lacks.startswith(("no ", "holes "))
    assert list(tmp_path.iterdir()) == []
    assert probe.this_host().trial("/proc").startswith("no nameless files")


def test_a_file_system_that_tells_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data everywhere would make every chunk resident."""
    for name, answer in (("lseek", 0), ("setxattr", None), ("pwrite", 4096)):
        monkeypatch.setattr(os, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(os, "open", lambda *_: os.dup(1))
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    assert "holes" in probe.this_host().trial(str(tmp_path))


@pytest.mark.parametrize(
    ("limit", "capabilities", "enough"),
    [
        (4096, "000001ffffffffff", True),
        (4096, "00000000a82425fb", False),
        (19456, "00000000a82425fb", True),
    ],
)
def test_descriptors_may_be_raised(
    machine: Machine, limit: int, capabilities: str, enough: bool
) -> None:
    """CAP_SYS_RESOURCE goes beyond the hard limit."""
    machine.write("proc/self/status", f"CapEff:\t{capabilities}\n")
    machine.change(descriptors_max=limit)
    assert ("descriptors" not in machine.missing()) == enough


def test_a_file_system_without_inode_counts_has_enough(machine: Machine) -> None:
    """btrfs says 0 of 0."""
    machine.change(statvfs=space(f_files=0, f_ffree=0))
    assert machine.missing() == {}


def test_this_machine_can_be_surveyed() -> None:
    """Whatever it lacks, every finding has a name, and a remedy exactly when it is not met."""
    findings = probe.survey(probe.this_host(), Cache(), CACHEFILES)
    assert findings and all(bool(finding.remedy) != finding.ok for finding in findings)


class FilesMachine(Machine):
    """One whose kernel has no EROFS over fscache and asks by fanotify."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.write("proc/kallsyms", "0 T erofs_register_sysfs\n0 t erofs_fileio_submit_bio\n")
        self.change(release="7.2.1")

    def missing(self, *paths: str) -> dict[str, Finding]:
        findings = probe.survey(self.host, self.cache, Kernel(), paths)
        assert all(bool(finding.remedy) != finding.ok for finding in findings)
        return {finding.name: finding for finding in findings if not finding.ok}


@pytest.mark.parametrize(
    ("release", "without", "chosen"),
    [
        ("6.12.0", "nothing", "cachefiles"),
        ("6.18.0", "nothing", "cachefiles"),
        ("6.18.0", "cachefiles_ondemand", "fanotify"),
        ("6.18.0", "erofs_fscache", "fanotify"),
        ("7.2.0", "nothing", "fanotify"),
        ("6.13.0", "cachefiles_ondemand", "cachefiles"),
    ],
)
def test_auto_takes_what_the_kernel_has(
    machine: Machine, release: str, without: str, chosen: str
) -> None:
    """cachefiles where it works, else fanotify; and says why."""
    machine.without(without)
    machine.change(release=release)
    name, reason = probe.choice(machine.host)
    assert name == chosen and reason


def test_a_machine_for_fanotify_lacks_nothing(tmp_path: Path) -> None:
    """Neither a device nor modules are looked for."""
    assert FilesMachine(tmp_path).missing() == {}


def test_what_fanotify_lacks(tmp_path: Path) -> None:
    """Each by its name, with a remedy."""
    machine = FilesMachine(tmp_path)
    machine.change(release="6.13.0", group=lambda directory: f"files in {directory} cannot be")
    machine.write("proc/kallsyms", "0 T erofs_register_sysfs\n")
    findings = probe.survey(machine.host, machine.cache, Kernel(transport="fanotify"))
    missing = {finding.name for finding in findings if not finding.ok}
    assert missing == {"kernel", "fanotify", "erofs-files"}
    machine.write("proc/kallsyms", "")
    findings = probe.survey(machine.host, machine.cache, Kernel(transport="fanotify"))
    assert "modprobe erofs" in next(f.remedy for f in findings if f.name == "erofs-files")


@pytest.mark.parametrize(
    ("fetch", "kernel_limit", "panic", "ok", "told"),
    [
        (Fetch(), "120", "0", True, "waits 30 s at most, a task has hung after 120 s"),
        (Fetch(on_source_outage="wait"), "120", "0", True, "waits 100 s"),
        (Fetch(on_source_outage="wait"), "100", "1", False, "after 100 s and the kernel panics"),
        (Fetch(on_source_outage="wait", outage_limit_s=3600.0), "0", "1", True, "waits 3600 s"),
        (Fetch(on_source_outage="wait", outage_limit_s=3600.0), "", "", True, "waits 3600 s"),
        (Fetch(deadline_s=240.0), "120", "0", False, "waits 240 s"),
    ],
)
def test_readers_wait_for_less_than_the_kernel_bears(
    machine: Machine, fetch: Fetch, kernel_limit: str, panic: str, ok: bool, told: str
) -> None:
    """The key to change and the kernel's are named."""
    machine.write("proc/sys/kernel/hung_task_timeout_secs", kernel_limit)
    machine.write("proc/sys/kernel/hung_task_panic", panic)
    findings = probe.survey(machine.host, machine.cache, CACHEFILES, fetch=fetch)
    (finding,) = [finding for finding in findings if finding.name == "hung-tasks"]
    assert finding.ok is ok and told in finding.found
    key = "deadline_s" if fetch.on_source_outage == "eio" else "outage_limit_s"
    assert ok or (f"{key} in [fetch] below {kernel_limit}" in finding.remedy)
    assert ok or "sysctl kernel.hung_task_timeout_secs=" in finding.remedy


def test_a_group_needs_a_second_holder(tmp_path: Path) -> None:
    """A daemon that alone holds it leaves zeros when it dies."""
    machine = FilesMachine(tmp_path)
    machine.process(812, "fscached", "/memfd:fscached-slots (deleted)")
    assert "pid 812 (fscached)" in machine.missing()["second-holder"].found
    machine.process(800, "supervise", "/memfd:fscached-slots (deleted)")
    assert machine.missing() == {}


def test_an_image_mounted_from_files_is_one(tmp_path: Path) -> None:
    """Nothing of ours may lie in it."""
    machine = FilesMachine(tmp_path)
    source = f"/var/lib/fscached/state/images/{'a' * 64}/image.boot"
    machine.mounts(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw", f"2 1 0:40 / /image ro - erofs {source} ro"
    )
    assert machine.missing("/image/fscached.toml").keys() == {"own-files"}
