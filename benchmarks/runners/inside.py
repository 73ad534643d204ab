"""A guest with a tree in four forms: ext4, its image through loop devices and fscached, FUSE.

Memory is the guest's, half of the large file. The programs that read lie on a disk of their own and
run below its root.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from environments import Options, guest
from environments.forms import FORMS, FSID, SOURCE, TOOLS, forms
from environments.guest import PROGRAMS
from environments.programs import passthrough
from harness.guest import Guest

from runners import MOUNT, LocalImage
from runners.fscached import LOG, SOCKET, Fscached

MEMORY_MIB = 512
DATA_BYTES = 2 * MEMORY_MIB << 20
PATIENCE_S = 1800.0

LOOP = r"""
modprobe loop; mkdir -p /mnt/loop
devices=()
for file in "$@"; do
	devices+=("$(losetup --find --show --read-only --direct-io=on "$file")")
done
mount -t erofs -o "ro,device=${devices[1]}" "${devices[0]}" /mnt/loop
"""
FUSE = f"""
modprobe fuse; mkdir -p /mnt/fuse
prlimit --nofile=1048576 {PROGRAMS}/passthrough_ll -o source={FORMS}/tree /mnt/fuse
"""
ROOT = f"""
mkdir -p /mnt/ext4; mount --bind {FORMS}/tree /mnt/ext4
for directory in proc dev mnt run; do mount --rbind /$directory {TOOLS}/$directory; done
"""
TIMED = """
import subprocess, sys, time
began = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
print(time.monotonic() - began)
sys.stderr.write(done.stderr[-4000:])
sys.exit(done.returncode)
"""
PREPARE = """
cd "$1" && mkdir upper work merged
mount -t overlay -o "lowerdir=$0,upperdir=upper,workdir=work" overlay merged
"""
UNITS = 300
BUILD = f"""
cd "$1/merged"
objects=$(find src -name '*.c' | sort | head -n {UNITS} | sed 's/c$/o/')
make -s -f makefile -j{guest.CPUS} CFLAGS="-O0 -w" $objects > /dev/null
built=$?; cd /; umount "$1/merged"; exit "$built"
"""


class Form:
    """One of them."""

    def __init__(self, name: str, path: str, fscached: Fscached | None = None) -> None:
        self.name = name
        self.path = path
        self._fscached = fscached

    def events(self) -> int | None:
        """See Held."""
        return self._fscached.reads() if self._fscached else None


class Inside:
    """A `contest.Place`."""

    data, data_bytes, sources = "data", DATA_BYTES, "sources"
    scratch, cpus = "/run/bench", guest.CPUS
    build = (PREPARE, BUILD)
    built = f"{UNITS} units of Debian's {SOURCE}, -O0, over overlayfs"

    def __init__(self, options: Options, inside: Guest, sources_bytes: int) -> None:
        self.sources_bytes = sources_bytes
        self._options = options
        self._guest = inside
        fscached = Fscached(inside)
        fscached.run(guest.fresh_cache(inside), {})
        self._fill(fscached)
        self.trees = [
            Form("ext4", "/mnt/ext4"),
            Form("loop", "/mnt/loop"),
            Form("complete", MOUNT, fscached),
            Form("fuse", "/mnt/fuse"),
        ]
        inside.put(f"{PROGRAMS}/passthrough_ll", passthrough(static=True).read_bytes(), mode=0o755)
        inside.run(["bash", "-euc", LOOP, "bash", *self._cache_files()])
        inside.run(FUSE)
        inside.run(ROOT)

    def run(self, argv: Sequence[str], *, limited: bool = False) -> str:
        """See Place; `limited` is everybody."""
        return self._guest.run(["chroot", TOOLS, *argv], timeout_s=PATIENCE_S).stdout

    def seconds(self, argv: Sequence[str]) -> float:
        """See Place."""
        said = self._guest.python(TIMED, "chroot", TOOLS, *argv, timeout_s=PATIENCE_S)
        return float(said.stdout)

    def drop_caches(self) -> None:
        """See Place."""
        self._guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")

    def described(self) -> dict[str, object]:
        """What has to stand beside a figure."""
        described = guest.described(self._guest, self._options)
        return {**described, "memory_mib": MEMORY_MIB, "built": self.built}

    def _fill(self, fscached: Fscached) -> None:
        """All of the image; mounted twice, for cache files get names at the end of a mount."""
        image = LocalImage(f"{FORMS}/image", FSID)
        fscached.mount(image)
        read = f"find {MOUNT} -type f -exec cat {{}} + > /dev/null; umount {MOUNT}"
        done = self._guest.run(read, timeout_s=PATIENCE_S, check=False)
        if done.returncode:
            said = self._guest.run(f"cat {LOG}", check=False).stdout
            raise SystemExit(f"{done.stderr}\n{said[-4000:]}")
        fscached.remount(image)

    def _cache_files(self) -> list[str]:
        """Of the bootstrap and of the one blob."""
        ask = ["fscached", "cache", "ls", "-o", "json", "--socket", SOCKET]
        files = json.loads(self._guest.run(ask).stdout)["files"]
        kinds = {file["kind"]: file["path"] for file in files}
        return [kinds["bootstrap"], kinds["blob"]]


@contextmanager
def inside(options: Options, data_bytes: int) -> Iterator[Inside]:
    """A guest with all forms of a tree with a file of so many bytes, or none."""
    there = forms(data_bytes)
    with guest.booted(options, [there.forms, there.tools], memory_mib=MEMORY_MIB) as running:
        yield Inside(options, running, there.sources_bytes)
