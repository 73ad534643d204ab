"""This machine with a Linux tree in five forms."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from environments import Options, native
from environments.linux import DATA_BYTES, NAME, Linux, linux
from environments.native import MemoryGroup, memory_group
from harness import command, registry

from runners.supervised import Supervised
from runners.trees import Fuse, Loop, Native, Tree

LIMIT_BYTES = DATA_BYTES // 2


class Form:
    """One of them."""

    def __init__(self, tree: Tree) -> None:
        self.name = tree.name
        self._tree = tree

    @property
    def path(self) -> str:
        """See Held."""
        return str(self._tree.directory)

    def events(self) -> int | None:
        """See Held."""
        return self._tree.events() if isinstance(self._tree, Supervised) else None


class Here:
    """A `contest.Place`."""

    build = (
        'make -s -C "$0" O="$1" tinyconfig',
        f'make -s -C "$0" O="$1" -j{os.cpu_count()} kernel/ mm/',
    )
    built = "kernel/ and mm/ of a Linux tinyconfig"
    """A third of it, so that a run stays short on two processors."""

    def __init__(
        self, options: Options, kept: Linux, group: MemoryGroup, trees: Sequence[Tree]
    ) -> None:
        self.trees = [Form(tree) for tree in trees]
        self.data, self.data_bytes = kept.data, DATA_BYTES
        self.sources = kept.source
        self.sources_bytes = int(command.run(["du", "-sb", kept.tree / kept.source]).split()[0])
        self.scratch = str(options.scratch)
        self.cpus = os.cpu_count() or 1
        self._options = options
        self._group = group

    def run(self, argv: Sequence[str], *, limited: bool = False) -> str:
        """See Place."""
        if not limited:
            return command.run(argv)
        with self._group.limited(LIMIT_BYTES):
            return command.run(self._group.within(argv))

    def seconds(self, argv: Sequence[str]) -> float:
        """See Place."""
        began = time.monotonic()
        command.run(argv)
        return time.monotonic() - began

    def drop_caches(self) -> None:
        """See Place."""
        native.drop_caches()

    def described(self) -> dict[str, object]:
        """What has to stand beside a figure."""
        return {
            **native.described(self._options),
            "memory_limit_mib": LIMIT_BYTES >> 20,
            "file_mib": DATA_BYTES >> 20,
            "built": self.built,
        }


@contextmanager
def here(options: Options) -> Iterator[Here]:
    """All forms mounted, and what is to be in a cache is there."""
    kept, scratch = linux(), options.scratch
    complete = Supervised("complete", scratch / "complete", {})
    marks = Supervised("marks", scratch / "marks", {"prefetch": {"enabled": False}})
    with memory_group() as group, ExitStack() as stack:

        def started(tree: Tree) -> Tree:
            tree.start()
            stack.callback(tree.stop)
            return tree

        with registry.on_host(kept.storage) as address:
            # `marks` ends last: at its end it unmounts whatever has a blob of this name.
            for daemon in (marks, complete):
                started(daemon)
                daemon.pull(f"{address}/{NAME}")
            complete.await_complete()
            for name in (kept.data, kept.source):
                everything = 'tar -cf - "$0" | cat > /dev/null'
                command.run(["sh", "-c", everything, marks.directory / name])
        bootstrap, blobs = complete.files()
        trees = [
            Native(kept.tree),
            started(Loop(scratch / "loop", bootstrap, blobs)),
            complete,
            marks,
            started(Fuse(scratch / "fuse", kept.tree, group)),
        ]
        yield Here(options, kept, group, trees)
