"""Stock Debian kernels: those before 6.14 with rebuilt cachefiles and erofs modules.

Debian ships both modules without on-demand mode. The option only changes what is compiled into the
two, so they are built out of tree against the stock headers, from `linux-source` of the same
version, and load into the unmodified kernel. From 6.14 on fanotify serves, and nothing is rebuilt.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness import command, store
from harness.apt import Archive, Package
from harness.command import CommandFailed

ONDEMAND_MODULES = {
    "cachefiles": (
        "CONFIG_CACHEFILES=m",
        "CONFIG_CACHEFILES_ONDEMAND=y",
        "KCFLAGS=-DCONFIG_CACHEFILES_ONDEMAND=1",
    ),
    "erofs": (
        "CONFIG_EROFS_FS=m",
        "CONFIG_EROFS_FS_ONDEMAND=y",
        "KCFLAGS=-DCONFIG_EROFS_FS_ONDEMAND=1 -DCONFIG_CACHEFILES_ONDEMAND=1",
    ),
}
"""Module (a directory of the kernel's fs/) to the make variables that switch on-demand mode on."""

# 6.12's link step would want pahole for the modules' BTF otherwise.
COMMON_VARIABLES = ("CONFIG_DEBUG_INFO_BTF_MODULES=",)

# Trace headers the modules include but some headers packages leave out.
TRACE_HEADERS = ("cachefiles.h", "erofs.h")

NATIVE = "native"
"""The name of the kernel this machine runs, where a guest needs no virtual machine."""

FANOTIFY_FIRST = (6, 14)
FANOTIFY_SUITE = "trixie-backports"
"""Where Debian has the kernels with fanotify's pre-content events."""

GUEST_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console", "virtio_rng"),
    *("ext4", "xfs", "btrfs", "cachefiles", "erofs"),
    *("sch_netem", "sch_tbf", "sch_htb", "veth"),
    *("loop", "overlay", "fuse", "dm_flakey"),
)
"""What a guest may need; whatever they depend on comes with them."""

RECIPE = store.key(ONDEMAND_MODULES, COMMON_VARIABLES, TRACE_HEADERS, GUEST_MODULES, 2)


class NoSuchKernel(Exception):
    """The mirror does not offer a kernel with everything needed to rebuild its modules."""


class NotHere(Exception):
    """This machine's kernel cannot stand in for a guest's; says why."""


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot: `vmlinuz` and `lib/modules/RELEASE` in one directory."""

    name: str
    release: str
    directory: Path

    @property
    def traced(self) -> bool:
        """Whether its cachefiles counts what it asks (tracepoints of on-demand mode)."""
        return not has_fanotify(self.name)

    @property
    def vmlinuz(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The tree `modprobe -d` would take: it has modules.dep."""
        return self.directory / "lib" / "modules" / self.release


@dataclass(frozen=True)
class Offer:
    """A kernel the mirror offers together with its headers and source, all of one version."""

    release: str
    version: str

    @property
    def image(self) -> Package:
        return Package(f"linux-image-{self.release}", self.version)

    @property
    def headers(self) -> Package:
        return Package(f"linux-headers-{self.release}", self.version)

    @property
    def source(self) -> Package:
        series = ".".join(self.release.split(".")[:2])
        return Package(f"linux-source-{series}", self.version)

    @property
    def entry(self) -> str:
        return f"{self.release}_{self.version.replace(':', '_')}_{RECIPE}"


def prepared(name: str) -> Kernel:
    """The kernel `name` (a series such as 6.12, a release or a Debian version), ready to boot.

    A series means the newest one offered the first time it was asked for: afterwards no network
    is needed. `native` is the kernel this machine runs: nothing of it is made ready. Raises
    NoSuchKernel, CommandFailed, apt.NoMirror, NotHere.
    """
    if name == NATIVE:
        _require_native()
        return Kernel(name, platform.release(), Path("/"))
    alias = store.root() / "kernels" / f"{name}_{RECIPE}"
    if not alias.is_dir():
        made = _stock(name) if has_fanotify(name) else _rebuilt(name)
        alias.unlink(missing_ok=True)
        alias.symlink_to(made.name)
    directory = alias.resolve()
    return Kernel(name, directory.name.split("_")[0], directory)


def _require_native() -> None:
    """Raises NotHere unless images can be served on this machine's own kernel."""
    release = platform.release()
    if not has_fanotify(release):
        raise NotHere(f"kernel {release} has no fanotify before content is read, 6.14 has")
    if os.geteuid() != 0:
        raise NotHere("not root: mounts and fanotify's permission events need it")
    known = "\terofs\n" in Path("/proc/filesystems").read_text()
    if not known and subprocess.run(["modprobe", "-q", "erofs"], check=False).returncode != 0:
        raise NotHere(f"kernel {release} has no erofs")


def _rebuilt(name: str) -> Path:
    archive = Archive()
    archive.refresh()
    offer = newest(archive, name)
    modules = ondemand_modules(archive, offer)

    def assemble(directory: Path) -> None:
        _assemble(archive, offer, modules, directory)

    return store.kept("kernels", offer.entry, assemble, keep=6)


def _stock(name: str) -> Path:
    archive = Archive(FANOTIFY_SUITE)
    archive.refresh()
    offers = _offers(archive)
    matching = [offer for offer in offers if _means(name, offer)]
    if not matching:
        raise _no_such_kernel(name, "linux-image", offers)
    offer = max(matching, key=functools.cmp_to_key(_older_first))

    def assemble(directory: Path) -> None:
        _assemble(archive, offer, None, directory)

    return store.kept("kernels", offer.entry, assemble, keep=6)


def has_fanotify(name: str) -> bool:
    """Whether a kernel of this name is served by fanotify."""
    if name == NATIVE:
        return True
    numbers = re.match(r"(\d+)\.(\d+)", name)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= FANOTIFY_FIRST


def running_modules() -> Path:
    """The directory with the two modules for the kernel this machine runs.

    Raises NoSuchKernel when Debian's mirror does not offer that kernel (any more).
    """
    release = platform.release()
    built_from = re.search(r"Debian (\S+)", platform.version())
    if built_from is None:
        raise NoSuchKernel(
            f"the running kernel {release} is not a Debian kernel: build its fs/cachefiles and "
            "fs/erofs with CONFIG_CACHEFILES_ONDEMAND=y and CONFIG_EROFS_FS_ONDEMAND=y yourself"
        )
    offer = Offer(release, built_from[1])
    directory = store.root() / "modules" / offer.entry
    if directory.is_dir():
        return directory
    archive = Archive()
    archive.refresh()
    return ondemand_modules(archive, newest(archive, offer.version, release))


def install(modules: Path, release: str) -> Path:
    """Copy the modules of `modules` where modprobe prefers them to the kernel's own."""
    updates = Path("/lib/modules") / release / "updates"
    updates.mkdir(exist_ok=True)
    for module in modules.glob("*.ko"):
        shutil.copyfile(module, updates / module.name)
    command.run(["depmod", "-a", release])
    return updates


def newest(archive: Archive, name: str, release: str | None = None) -> Offer:
    """The newest kernel that `name` can mean; `release` narrows a version down to one flavour."""
    offers = _offers(archive)
    headers = set(archive.versions(r"linux-headers-\d.*amd64"))
    sources = set(archive.versions(r"linux-source-\d.*"))
    matching = [
        offer
        for offer in offers
        if offer.headers in headers
        and offer.source in sources
        and (release is None or offer.release == release)
        and _means(name, offer)
    ]
    if not matching:
        packages = "linux-image, linux-headers and linux-source of one version"
        complete = [offer for offer in offers if offer.source in sources]
        raise _no_such_kernel(release or name, packages, complete)
    return max(matching, key=functools.cmp_to_key(_older_first))


def _offers(archive: Archive) -> list[Offer]:
    """Every kernel image the mirror has."""
    images = archive.versions(r"linux-image-\d.*amd64")
    return [Offer(image.name.removeprefix("linux-image-"), image.version) for image in images]


def _no_such_kernel(name: str, packages: str, offers: list[Offer]) -> NoSuchKernel:
    versions = ", ".join(sorted({offer.version for offer in offers}))
    return NoSuchKernel(
        f"kernel {name}: the mirror does not offer {packages} for it. Boot one of the versions it "
        f"offers: {versions}"
    )


def _means(name: str, offer: Offer) -> bool:
    if name in (offer.release, offer.version):
        return True
    return offer.release.startswith(f"{name}.") and offer.release.endswith("-cloud-amd64")


def _older_first(left: Offer, right: Offer) -> int:
    compare = ["dpkg", "--compare-versions", left.version]
    if subprocess.run([*compare, "lt", right.version], check=False).returncode == 0:
        return -1
    return int(left.version != right.version)


def ondemand_modules(archive: Archive, offer: Offer) -> Path:
    """The directory with `cachefiles.ko` and `erofs.ko` of `offer`, built when not kept already."""

    def build(directory: Path) -> None:
        work = directory / "work"
        work.mkdir()
        headers = _headers(archive, offer, work)
        tree = _source(archive, offer, work)
        for header in TRACE_HEADERS:
            _complete(work, tree / "include/trace/events" / header)
        for module in ONDEMAND_MODULES:
            built = _make(headers, tree / "fs" / module, module)
            shutil.copyfile(built, directory / built.name)
        shutil.rmtree(work)

    return store.kept("modules", offer.entry, build, keep=6)


def _headers(archive: Archive, offer: Offer, work: Path) -> Path:
    """Unpack the headers below `work` and return the directory to build against."""
    parts = [
        dependency
        for dependency in archive.depends(offer.headers)
        if re.match(r"linux-(kbuild|headers)-", dependency)
    ]
    archive.extract([offer.headers, *parts], work)
    headers = work / "usr/src" / offer.headers.name
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{work}/usr/src/"))
    return headers


def _source(archive: Archive, offer: Offer, work: Path) -> Path:
    """Take the needed directories out of the source package, streaming: all of it is 1.5 GB."""
    [package] = archive.download([offer.source], work)
    top = offer.source.name
    wanted = [f"{top}/fs/{module}" for module in ONDEMAND_MODULES]
    wanted += [f"{top}/include/trace/events/{header}" for header in TRACE_HEADERS]
    pipeline = (
        'dpkg-deb --fsys-tarfile "$1" | tar -xO "./usr/src/$2.tar.xz" | xz -dc -T0 '
        '| tar -x -C "$3" "${@:4}"'
    )
    command.run(["bash", "-o", "pipefail", "-c", pipeline, "bash", package, top, work, *wanted])
    package.unlink()
    return work / top


def _complete(work: Path, header: Path) -> None:
    [include] = work.glob("usr/src/linux-headers-*-common/include/trace/events")
    if not (include / header.name).exists():
        shutil.copyfile(header, include / header.name)


def _make(headers: Path, directory: Path, module: str) -> Path:
    variables = [*ONDEMAND_MODULES[module], *COMMON_VARIABLES]
    jobs = f"-j{os.cpu_count() or 1}"
    command.run(["make", jobs, "-C", headers, f"M={directory}", *variables, "modules"])
    command.run(["strip", "--strip-debug", directory / f"{module}.ko"])
    return directory / f"{module}.ko"


def _assemble(archive: Archive, offer: Offer, rebuilt: Path | None, directory: Path) -> None:
    """Make a bootable directory: the image's vmlinuz, and the guest's modules with modules.dep,
    the rebuilt ones in place of the kernel's own."""
    image = directory / "image"
    image.mkdir()
    archive.extract([offer.image], image)
    shutil.move(image / f"boot/vmlinuz-{offer.release}", directory / "vmlinuz")
    if not (image / "lib").exists():  # trixie and later
        (image / "lib").symlink_to("usr/lib")
    target = directory / "lib/modules" / offer.release
    own = (image / "lib/modules" / offer.release).resolve()
    for module in _needed(image, offer.release):
        _copy_module(module, target / module.resolve().relative_to(own))
    if rebuilt is not None:
        for stock in target.rglob("*.ko"):
            if stock.stem in ONDEMAND_MODULES:
                stock.unlink()
        shutil.copytree(rebuilt, target / "updates")
    for listing in image.glob("lib/modules/*/modules.*"):
        shutil.copyfile(listing, target / listing.name)
    command.run(["depmod", "-b", directory, offer.release])
    shutil.rmtree(image)


def _needed(image: Path, release: str) -> list[Path]:
    """The files of GUEST_MODULES and of all they depend on."""
    command.run(["depmod", "-b", image, release])
    files: set[Path] = set()
    for name in GUEST_MODULES:
        shown = command.run(["modprobe", "-d", image, "-S", release, "--show-depends", name])
        files.update(Path(line.split()[1]) for line in shown.splitlines() if "insmod" in line)
    return sorted(files)


def _copy_module(module: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if module.suffix != ".xz":
        shutil.copyfile(module, target)
        return
    with target.with_suffix("").open("wb") as plain:
        done = subprocess.run(["xz", "-dc", module], stdout=plain, check=False)
    if done.returncode != 0:
        raise CommandFailed(f"xz -dc {module}: exit status {done.returncode}")
