"""Cold starts of containers, as in the article on Dragonfly and Nydus: from nothing to the first
line of output, or the first reply, beside a full pull by Debian's containerd.

Everything is real but the dfdaemons, which cannot be installed here: they are the tests' stand-in.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from environments import Options, native
from environments.guest import booted, described
from environments.network import LINKS, PEER, REGISTRY, Link, Network, Site
from environments.runtimes import Published, published
from harness import disk, kernel
from harness.containerd import Containerd
from harness.daemon import Daemon, drop_caches
from harness.guest import Guest
from harness.qemu import with_one_retry
from report import Report, Result, result
from runners.launched import ROOTFS, Launched, Launcher, Program
from runners.peer import Peer
from runners.swarm import MIRROR, Swarm

REPETITIONS = 1
TAKES_PEER = True
MOUNT = "/mnt/image"
WRITABLE = "/run/bench/writable"
TRACE = "/run/bench/trace"
WHOLE_S = 300.0
WARM = (
    "find /opt/fscached /usr/bin/containerd* /usr/bin/ctr /usr/sbin/runc /usr/bin/curl "
    "/usr/lib/python3* /usr/lib/x86_64-linux-gnu -type f -exec cat {} + > /dev/null"
)
"""What a node runs all day is in its memory."""

MIB = 1 << 20


SCENARIOS = {
    "full": "full pull",
    "cold": "cold",
    "traced": "cold, with a trace",
    "peers": "cold, through peers",
    "remote": "a remote peer has it",
    "local": "the local peer has it",
    "cached": "the cache has it",
}
"""The article's six and one more, in the order in which they are run."""


class Workload(NamedTuple):
    """A program, the image it comes from, and in which scenarios it is run."""

    image: str
    program: Program
    scenarios: tuple[str, ...] = tuple(SCENARIOS)


UNFAVOURABLE = ("full", "cold", "traced")
"""For what reads much of its image: there is more to lose than to win."""

EVERY_FILE = "find / -xdev -type f -exec cat {} + > /dev/null; echo done"

WORKLOADS = {
    "python": Workload("python", Program(("python3", "-V"), "Python 3.")),
    "node": Workload("node", Program(("node", "-v"), "v")),
    "server": Workload(
        "science",
        Program(("python3", "/app/server.py"), "ready", "http://127.0.0.1:8000/"),
        UNFAVOURABLE,
    ),
    "cat": Workload("python", Program(("sh", "-c", EVERY_FILE), "done"), UNFAVOURABLE),
    "ruby": Workload("ruby", Program(("ruby", "-v"), "ruby 3.")),
    "rust": Workload("rust", Program(("rustc", "-V"), "rustc 1.")),
}

DEFAULTS = ("python", "node", "server", "cat")
LONG = (*DEFAULTS, "ruby", "rust")


class Measured(NamedTuple):
    """One start, and what the origin had sent when the program was there."""

    launched: Launched
    sent_bytes: int


class Bench:
    """One image and one program."""

    def __init__(
        self, guest: Guest, site: Site, image: Published, program: Program, peer: str
    ) -> None:
        self._measured: dict[str, list[Measured]] = defaultdict(list)
        self._guest = guest
        self._site = site
        self._image = image
        self._rafs = f"{REGISTRY}/{image.rafs_tag}"
        self._program = program
        self._launcher = Launcher(guest)
        self._containerd = Containerd(guest, [REGISTRY])
        self._daemon = Daemon(guest)
        self._swarm = Swarm(guest)
        self._peer = Peer(guest, peer) if peer else None
        self._trace = b""
        guest.run(WARM)

    def run(self, scenarios: Sequence[str], repetitions: int) -> dict[str, list[Measured]]:
        """Every start, by scenario, over the link as it is now."""
        self._measured = defaultdict(list)
        for _ in range(repetitions):
            for scenario in scenarios:
                getattr(self, scenario)()
        return self._measured

    def full(self) -> None:
        """containerd's content store is empty."""
        reference = f"{REGISTRY}/{self._image.layers_tag}"
        self._containerd.start()
        pull = self._containerd.pull(reference)
        self._measure("full", pull, self._containerd.mount(reference, ROOTFS))
        self._containerd.require_pulled()
        self._containerd.stop(ROOTFS)

    def cold(self) -> None:
        """Straight from the registry."""
        with self._serving():
            self._lazy("cold")

    def peer(self) -> None:
        """Another daemon, straight from the registry."""
        assert self._peer is not None
        self._guest.run(f"rm -rf {disk.CACHE_MOUNT}/*")
        self._peer.start(disk.CACHE_MOUNT)
        mount = self._peer.offered(REGISTRY, self._image.rafs_tag, prefetch=True)
        self._measure("peer", ["sh", "-c", mount], self._writable())
        self._guest.run(f"umount {ROOTFS}")
        self._peer.stop()

    def traced(self) -> None:
        """The same, with the trace of an earlier run."""
        if not self._trace:
            self._record()
        with self._serving():
            self._guest.put(TRACE, self._trace)
            self._guest.run(["fscached", "trace", "import", TRACE])
            self._lazy("traced")

    def peers(self) -> None:
        """Nobody has anything."""
        self._through_peers("peers")

    def remote(self) -> None:
        """The peer's dfdaemon has all."""
        self._through_peers("remote", filled=PEER)

    def local(self) -> None:
        """The dfdaemon of this node has all."""
        self._through_peers("local", filled="")

    def cached(self) -> None:
        """All of it is in files of the cache, none of it in memory."""
        with self._serving():
            wait = ["fscached", "prefetch", "--wait", self._rafs]
            self._guest.run(wait, timeout_s=WHOLE_S)
            drop_caches(self._guest)
            self._guest.run(WARM)
            self._lazy("cached")

    # -- steps ----------------------------------------------------------------------------------

    def _through_peers(self, scenario: str, filled: str | None = None) -> None:
        self._swarm.start()
        if filled is not None:
            self._swarm.fill(filled, self._image.name, self._image.digests)
        with self._serving({"mirrors": [{"host": MIRROR}]}):
            self._lazy(scenario)
        self._swarm.stop()

    def _record(self) -> None:
        """What the program reads, once, with nothing that reads ahead of it."""
        with self._serving(prefetch=False):
            self._launcher.launch(self._program, *self._lazily())
            self._guest.run(["fscached", "trace", "export", MOUNT, "--to", TRACE])
            self._trace = self._guest.get(TRACE)

    @contextmanager
    def _serving(
        self, source: dict[str, object] | None = None, *, prefetch: bool = True
    ) -> Iterator[None]:
        """The daemon, its cache empty at the start."""
        self._guest.run(f"rm -rf {disk.CACHE_MOUNT}/*; mkdir -p {MOUNT}")
        registries = {"insecure_registries": [REGISTRY], **(source or {})}
        self._daemon.configure({"source": registries, "prefetch": {"enabled": prefetch}})
        self._daemon.start()
        yield
        self._guest.run(f"umount {ROOTFS} {MOUNT}")
        self._daemon.stop()

    def _lazy(self, scenario: str) -> None:
        self._measure(scenario, *self._lazily())

    def _lazily(self) -> tuple[list[str], list[str]]:
        """The commands that mount the image, and give a container a root that it can write."""
        return ["fscached", "mount", self._rafs, MOUNT], self._writable()

    def _writable(self) -> list[str]:
        self._guest.run(f"rm -rf {WRITABLE}; mkdir -p {WRITABLE}/upper {WRITABLE}/work")
        layers = f"lowerdir={MOUNT},upperdir={WRITABLE}/upper,workdir={WRITABLE}/work"
        return ["mount", "-t", "overlay", "-o", layers, "overlay", ROOTFS]

    def _measure(self, scenario: str, pull: Sequence[str], create: Sequence[str]) -> None:
        self._site.warm()
        found = self._launcher.launch(self._program, pull, create)
        requests, sent_bytes = self._site.sent()
        self._measured[scenario].append(Measured(found, sent_bytes))
        steps = ", ".join(f"{name} {s:.2f} s" for name, s in found._asdict().items() if s)
        title = SCENARIOS.get(scenario, scenario)
        _say(f"  {title}: {steps}; {requests} requests, {sent_bytes / MIB:.1f} MiB")


def run_native(options: Options) -> Report:
    """The same on this machine's own kernel: no processor is emulated, so links count for more."""
    return run(replace(options, kernel=kernel.NATIVE))


def run(options: Options) -> Report:
    """Every workload over every link."""
    names, links, scenarios = _chosen(options)
    environment: dict[str, object] = {}
    results: list[Result] = []
    for name in names:
        workload = WORKLOADS[name]
        wanted = [each for each in workload.scenarios if each in scenarios]
        wanted += ["peer"] if options.peer else []
        environment, found = with_one_retry(partial(_run, options, name, links, wanted))
        results += found
    _say_ratios(results)
    return Report(options.bench, environment, results)


def _run(
    options: Options, name: str, links: Sequence[Link], scenarios: Sequence[str]
) -> tuple[dict[str, object], list[Result]]:
    """One workload, in a guest of its own: one that panics does not take all others along."""
    image = published(WORKLOADS[name].image)
    results: list[Result] = []
    with booted(options, [image.disk]) as guest:
        network, site = Network(guest), Site(guest, image)
        site.start()
        bench = Bench(guest, site, image, WORKLOADS[name].program, options.peer)
        for link in links:
            _say(f"{name}, {link.name}")
            network.shape(link)
            measured = bench.run(scenarios, options.repetitions)
            results += _results(f"{link.name}_{name}", measured)
        native_here = options.kernel == kernel.NATIVE
        here = native.described(options) if native_here else described(guest, options)
        return here, results


def _chosen(options: Options) -> tuple[list[str], list[Link], list[str]]:
    """Workloads, links and scenarios; all of a kind of which none is named.

    Raises SystemExit for a name that is none.
    """
    defaults = LONG if options.long else DEFAULTS
    known = (WORKLOADS, LINKS, SCENARIOS)
    for name in options.only:
        if not any(name in kind for kind in known):
            every = ", ".join(name for kind in known for name in kind)
            raise SystemExit(f"--only {name}: none of {every}")
    names = [name for name in WORKLOADS if name in options.only] or list(defaults)
    links = [link for name, link in LINKS.items() if name in options.only] or [*LINKS.values()]
    scenarios = [name for name in SCENARIOS if name in options.only] or list(SCENARIOS)
    return names, links, scenarios


def _results(name: str, measured: Mapping[str, Sequence[Measured]]) -> list[Result]:
    """The full pull's figures by themselves, all others beside them."""
    baseline = _figures(measured.get("full", ()))
    results = []
    for scenario, starts in measured.items():
        for figure, ours in _figures(starts).items():
            other = [] if scenario == "full" else baseline.get(figure, [])
            unit = "MiB" if figure == "origin" else "s"
            results.append(result(f"{name}_{scenario}_{figure}", unit, "lower", ours, other))
    peer = _figures(measured.get("peer", ()))
    for figure, ours in _figures(measured.get("cold", ())).items() if peer else ():
        unit, scenario = "MiB" if figure == "origin" else "s", "cold-beside-peer"
        results.append(result(f"{name}_{scenario}_{figure}", unit, "lower", ours, peer[figure]))
    return results


def _figures(starts: Sequence[Measured]) -> dict[str, list[float]]:
    """By name, a value from every start: the steps in seconds, what the origin sent in MiB."""
    figures: dict[str, list[float]] = defaultdict(list)
    for launched, sent_bytes in starts:
        for step, seconds in launched._asdict().items():
            if seconds is not None:
                figures[step].append(seconds)
        figures["origin"].append(sent_bytes / MIB)
    return figures


def _say_ratios(results: Sequence[Result]) -> None:
    """The article's table: how long until the program was there, and its ratio to a full pull."""
    for link, programs in charts(results).items():
        _say(f"{link:<24}" + "".join(f"{program:>18}" for program in programs))
        for scenario, title in SCENARIOS.items():
            cells = [_cell(of.get(scenario)) for of in programs.values()]
            _say(f"{title:<24}" + "".join(f"{cell:>18}" for cell in cells))


def _cell(found: Result | None) -> str:
    if found is None:
        return ""
    return f"{found.median:.1f} s" + ("" if found.ratio is None else f" ×{found.ratio:.2f}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw(report: Report, file: Path) -> None:
    """The article's bar chart."""
    from plots import starts

    starts.draw(report, charts(report.results), SCENARIOS, file)


def charts(results: Iterable[Result]) -> dict[str, dict[str, dict[str, Result]]]:
    """By link, program and scenario: when the program was there, its first reply if it serves."""
    found: dict[str, dict[str, dict[str, Result]]] = {}
    for each in results:
        link, program, scenario, step = each.name.split("_")
        if step in ("ready", "reply"):
            found.setdefault(link, {}).setdefault(program, {})[scenario] = each
    return found
