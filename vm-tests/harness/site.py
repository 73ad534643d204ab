"""A node that loses its daemon or its power: what is resident, what its origin was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable

from harness import disk, inspector, noise
from harness.guest import Guest, Process
from harness.inspector import Seen
from harness.ledger import Asked, Ledger
from harness.node import Node
from harness.registry import Registry

SHAPE = noise.IMAGES[noise.CRASH[0]]
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES

LONGEST_S = 3600.0
PATIENCE_S = 300.0

EXTENTS = """
import json, sys
sys.path.insert(0, "/run")
from harness.killer import extents
print(json.dumps(extents(sys.argv[1])))
"""


class Site:
    """A node whose origin keeps a ledger."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.node = Node(guest, Registry(guest))
        self.daemon = self.node.daemon
        self.ledger = Ledger(guest, self.node.registry)

    def mount(self, image: str, directory: str) -> None:
        self.daemon.mount(f"{self.ledger.address}/{image}", directory)

    def start(self, kind: str, *words: object) -> Process:
        return inspector.start(self.guest, kind, *map(str, words), timeout_s=LONGEST_S)

    def readers(self, mount: str, image: str, seed: int) -> list[Process]:
        names = noise.names(image)
        return inspector.sixteen(self.guest, mount, names, seed, timeout_s=LONGEST_S)

    def stream(self, mount: str, image: str) -> Seen:
        reader = self.start("stream", mount, *noise.names(image))
        return inspector.seen(reader, timeout_s=PATIENCE_S)

    def cache_file(self, image: str) -> str:
        """Where the data of an image is in the guest, empty when it is nowhere."""
        # cachefiles puts a D before the name of a file of data (fs/cachefiles/key.c).
        name = f"{'D' if self.guest.kernel.traced else ''}{blob_id(image)}"
        found = self.guest.run(["find", disk.CACHE_MOUNT, "-name", name, "-size", "+0"])
        return found.stdout.strip()

    def resident(self, image: str) -> set[int]:
        """The chunks whose every block is data in the cache file, by looking at it."""
        path = self.cache_file(image)
        return whole(json.loads(self.guest.python(EXTENTS, path).stdout)) if path else set()

    def asked_chunks(self, image: str) -> list[int]:
        """Every chunk that was asked of the origin, as often as it was."""
        return [chunk for asked in self.asked(image) for chunk in chunks(asked)]

    def asked(self, image: str) -> list[Asked]:
        """What was asked of the image's data; what lies behind it is the chunks' own table."""
        asked = self.ledger.asked(blob_id(image))
        return [one for one in asked if one.start < SHAPE.blob_bytes]


def blob_id(image: str) -> str:
    """Of the image's only blob."""
    [found] = noise.origin().blob_ids(image)
    return found


def whole(extents: Iterable[tuple[int, int]]) -> set[int]:
    """The chunks that lie in extents altogether."""
    size = SHAPE.chunk_bytes
    return {chunk for start, end in extents for chunk in range(-(-start // size), end // size)}


def chunks(asked: Asked) -> range:
    """The chunks a request has bytes of."""
    return range(asked.start // SHAPE.chunk_bytes, -(-asked.end // SHAPE.chunk_bytes))
