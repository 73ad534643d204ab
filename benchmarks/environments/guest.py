"""A guest as a bench's environment: booted with its disks, our C programs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harness import disk, qemu, store
from harness.disk import Disk
from harness.guest import Guest

from environments import Options, host
from environments.programs import HERE, compiled

PROGRAMS = "/run/bench"
CACHE = f"{disk.CACHE_MOUNT}/bench"

CPUS = 2
MEMORY_MIB = 2048


@contextmanager
def booted(
    options: Options, disks: Sequence[Disk], memory_mib: int = MEMORY_MIB
) -> Iterator[Guest]:
    """A guest with an empty cache disk, `disks`, and what lies beside this directory in
    `PROGRAMS`: the C programs, compiled, and `probes.py`."""
    results = store.root() / "results"
    results.mkdir(exist_ok=True)
    attached = [disk.cache(options.scratch / "cache.ext4"), *disks]
    console = results / f"bench-{options.bench}.console"
    with Guest(options.kernel, console, disks=attached, memory_mib=memory_mib, cpus=CPUS) as guest:
        for source in HERE.glob("*.c"):
            guest.put(f"{PROGRAMS}/{source.stem}", compiled(source).read_bytes(), mode=0o755)
        guest.put(f"{PROGRAMS}/probes.py", (HERE / "probes.py").read_bytes())
        yield guest
        guest.power_off()


def described(guest: Guest, options: Options) -> dict[str, object]:
    """What has to stand beside a figure from this guest."""
    return {
        **host(options),
        "kernel": guest.kernel.release,
        "emulation": qemu.acceleration()[1].partition(",")[0],
        "cpus": CPUS,
        "memory_mib": MEMORY_MIB,
    }


def probe(guest: Guest, name: str, *arguments: object, timeout_s: float = 300.0) -> str:
    """Run one of the programs in `probes.py` and return what it prints."""
    words = ["python3", f"{PROGRAMS}/probes.py", name, *map(str, arguments)]
    return guest.run(words, timeout_s=timeout_s).stdout


def fresh_cache(guest: Guest) -> str:
    """An empty directory on the cache disk, the page cache cleared of what was there before."""
    guest.run(f"rm -rf {CACHE}; mkdir {CACHE}; sync")
    return CACHE
