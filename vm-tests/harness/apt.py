"""Debian packages of any release, fetched without touching the host's own apt."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import command, store

HOST_SOURCES = Path("/etc/apt")


class NoMirror(Exception):
    """The host's apt sources name no Debian mirror for its own release."""


class Entry(NamedTuple):
    """One line of apt's one-line format (sources.list(5))."""

    options: str
    uri: str
    suite: str
    components: str

    def __str__(self) -> str:
        words = ["deb", self.options, self.uri, self.suite, self.components]
        return " ".join(word for word in words if word)


class Package(NamedTuple):
    """A package in one version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}={self.version}"


def codename() -> str:
    """The host's Debian release, as `/etc/os-release` names it."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def mirror() -> list[Entry]:
    """The entries of the host's own apt sources for its own release.

    Raises NoMirror when there is none.
    """
    files = [HOST_SOURCES / "sources.list", *sorted(HOST_SOURCES.glob("sources.list.d/*"))]
    entries: list[Entry] = []
    for file in files:
        if file.suffix == ".sources":
            entries += _deb822(file.read_text())
        elif file.suffix == ".list" and file.is_file():
            entries += _one_line(file.read_text())
    release = codename()
    own = [e for e in entries if "main" in e.components.split() and _is_of(release, e.suite)]
    if not any(entry.suite == release for entry in own):
        raise NoMirror(
            f"no entry for Debian {release or '(unknown release)'} in {HOST_SOURCES}/sources.list "
            "or sources.list.d: add one, the mirror is taken from there"
        )
    return own


def _is_of(release: str, suite: str) -> bool:
    return bool(release) and re.match(rf"{release}(-|/|$)", suite) is not None


def _deb822(text: str) -> Iterable[Entry]:
    for stanza in re.split(r"\n\s*\n", text):
        unfolded = re.sub(r"\n[ \t]+", " ", re.sub(r"(?m)^#.*\n?", "", stanza))
        fields = dict(re.findall(r"(?m)^([\w-]+):[ \t]*(.*)$", unfolded))
        if "deb" not in fields.get("Types", "").split() or fields.get("Enabled") == "no":
            continue
        key = fields.get("Signed-By", "")
        options = f"[signed-by={key}]" if key.startswith("/") else ""
        for uri in fields.get("URIs", "").split():
            for suite in fields.get("Suites", "").split():
                yield Entry(options, uri, suite, fields.get("Components", ""))


def _one_line(text: str) -> Iterable[Entry]:
    pattern = r"(?m)^deb\s+(\[[^\]]*\])?\s*(\S+)\s+(\S+)\s+([^#\n]*)"
    for options, uri, suite, components in re.findall(pattern, text):
        yield Entry(options, uri, suite, components.strip())


class Archive:
    """The host's mirror with lists and cache of its own: the host's suites and their backports, or
    one suite of another release."""

    def __init__(self, suite: str | None = None, *, sources: bool = False) -> None:
        """`sources`: of packages' sources alone."""
        entries = mirror()
        base = next(entry for entry in entries if entry.suite == codename())
        entries.append(base._replace(suite=f"{base.suite}-backports"))
        if suite is not None:
            entries = [base._replace(suite=suite)]
        name = f"{suite or base.suite}{'-sources' if sources else ''}"
        self._directory = store.root() / "apt" / name
        for sub in ("lists/partial", "cache/archives/partial"):
            (self._directory / sub).mkdir(parents=True, exist_ok=True)
        kind = "deb-src" if sources else "deb"
        lines = "".join(f"{kind}{str(entry).removeprefix('deb')}\n" for entry in entries)
        (self._directory / "sources.list").write_text(lines)

    def refresh(self) -> None:
        """Read what the mirror offers now."""
        self._apt("get", "-qq", "update")

    def versions(self, pattern: str) -> list[Package]:
        """Every version of the packages whose name matches `pattern`, a full-match expression."""
        names = [n for n in self._apt("cache", "pkgnames").split() if re.fullmatch(pattern, n)]
        rows = self._apt("cache", "madison", *names).splitlines() if names else []
        columns = ([column.strip() for column in row.split("|")] for row in rows)
        return sorted({Package(name, version) for name, version, _ in columns})

    def depends(self, package: Package) -> list[str]:
        """The names in a package's Depends field."""
        shown = self._apt("cache", "show", str(package))
        field = re.search(r"(?m)^Depends: (.*)$", shown)
        return re.findall(r"(?:^|, )([\w.+-]+)", field[1]) if field else []

    def extract(self, packages: Sequence[Package | str], directory: Path) -> None:
        """Download packages and unpack them into `directory`, installing nothing."""
        for file in self.download(packages, directory):
            command.run(["dpkg-deb", "--extract", file, directory])
            file.unlink()

    def download(self, packages: Sequence[Package | str], directory: Path) -> list[Path]:
        """Download packages into `directory` and return the files."""
        before = set(directory.glob("*.deb"))
        self._apt("get", "-qq", "download", *map(str, packages), cwd=directory)
        return sorted(set(directory.glob("*.deb")) - before)

    def download_source(self, package: str, directory: Path) -> Path:
        """Download the newest sources of a package; the file that describes them (.dsc)."""
        words = ["-qq", "source", "--download-only", "--only-source", package]
        self._apt("get", *words, cwd=directory)
        return max(directory.glob("*.dsc"))

    def _apt(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::Etc::sourcelist": self._directory / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self._directory / "lists",
            "Dir::Cache": self._directory / "cache",
            # The sandbox user could not write below a home directory.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }
        flags = [f"-o{name}={value}" for name, value in options.items()]
        return command.run([f"apt-{tool}", *flags, *words], cwd=cwd)
