"""What a bug report is made of. Each part is what was found, or why nothing was.

Nothing here looks into an image: it may wait for the daemon whose trouble this is about.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

from fscached import config, config_text, manual, version
from fscached.cli import doctor
from fscached.config import Config
from fscached.control.client import Client
from fscached.failure import Failure
from fscached.redaction import Redaction, secrets_in
from fscached.transport import host, probe
from fscached.transport.mount import MountPoint, is_image, mount_points

PART_CHARACTERS_MAX = 4 << 20
CLIENT_TIMEOUT_S = 10.0
PROGRAM_TIMEOUT_S = 20.0
UNIT = "fscached"
_MODULES = ("cachefiles", "fscache", "netfs", "erofs", "overlay")
_RELEVANT = re.compile(
    r"(?i)dmesg:|erofs|cachefiles|fscache|netfs|fanotify|blocked for more than|out of memory|"
    r"oom-kill|I/O error|EXT4-fs|XFS|BTRFS|Linux version"
)
_PROC = Path("/proc")
_FSCACHE = _PROC / "fs/fscache"


class Evidence:
    """Everything about one machine and its daemon, credentials taken out."""

    def __init__(
        self, config_path: str | None, socket: str | None, log_file: str | None, log_lines: int
    ) -> None:
        """`log_file`: where the configuration does not say it."""
        self._config_path = config_path
        self._log_file = log_file
        self._log_lines = log_lines
        self._problem = ""
        try:
            self._config = config.load(config_path)
        except Failure as failure:
            self._problem, self._config = str(failure), Config()
        self._client = Client(socket or self._config.api_socket, CLIENT_TIMEOUT_S)
        self._redaction = Redaction(self._known_secrets())

    def collect(self) -> dict[str, str]:
        """Texts by file name."""
        parts: dict[str, Callable[[], str]] = {
            "version.txt": version.text,
            "config.toml": self._settings,
            "status.json": lambda: self._asked("/api/v2/status"),
            "cache.json": lambda: self._asked("/api/v2/cache"),
            "events.json": lambda: self._asked("/api/v1/daemon/events"),
            "doctor.txt": self._doctor,
            "log.txt": self._log,
            "kernel.txt": self._kernel,
            "kernel-log.txt": lambda: "".join(_kernel_lines(_program("dmesg"))),
            "fscache.txt": _fscache,
            "mounts.txt": self._mounts,
            "process.txt": self._process,
            "unit.txt": lambda: _program("systemctl", "show", "--no-pager", UNIT),
        }
        return {name: self._part(collect) for name, collect in parts.items()}

    def _part(self, collect: Callable[[], str]) -> str:
        try:
            text = collect()
        except Exception as error:
            # Half a report is better than none, and the reason is part of it.
            text = f"nothing: {type(error).__name__}: {error}\n"
        return self._redaction.text(text[-PART_CHARACTERS_MAX:])

    def _known_secrets(self) -> Iterator[str]:
        yield from secrets_in(dict(os.environ))
        source = self._config.source
        for mirror in source.mirrors:
            yield from mirror.headers.values()
        for path in (self._config_path or str(config.DEFAULT_PATH), *_docker_files(source)):
            try:
                yield from secrets_in(config_text.decode(config_text.read(path), path))
            except Failure:
                continue  # not there, or said in config.toml

    def _settings(self) -> str:
        if self._problem:
            return f"# {self._problem}\n"
        return manual.explain(manual.shareable(self._config))

    def _asked(self, path: str) -> str:
        return json.dumps(self._redaction.value(self._client.get(path)), indent=2) + "\n"

    def _doctor(self) -> str:
        settings = self._config
        paths = [self._config_path or str(config.DEFAULT_PATH), settings.paths.state_directory]
        machine = host.this_host(settings.kernel.device)
        findings = probe.survey(machine, settings.cache, settings.kernel, paths)
        return "\n".join([*doctor.text(findings), ""])

    def _log(self) -> str:
        if not (file := self._log_file or self._config.log.file):
            return _program("journalctl", "--no-pager", "-u", UNIT, "-n", str(self._log_lines))
        lines: deque[str] = deque(maxlen=self._log_lines)
        for path in (Path(f"{file}.1"), Path(file)):
            if path.is_file():
                with path.open(errors="replace") as opened:
                    lines.extend(opened)
        return "".join(lines)

    def _kernel(self) -> str:
        modules = host.text_of(_PROC / "modules").splitlines()
        loaded = [line for line in modules if line.startswith(tuple(f"{it} " for it in _MODULES))]
        files = ("version", "meminfo", "pressure/io", "pressure/memory", "sys/fs/file-nr")
        texts = [f"{name}:\n{host.text_of(_PROC / name)}" for name in files]
        return "\n".join([platform.platform(), *loaded, "", *texts])

    def _mounts(self) -> str:
        points = mount_points()
        directories = [self._config.cache.directory, self._config.paths.state_directory]
        lines = [_line(point) for point in points if is_image(point) or point.fs_type == "erofs"]
        for directory in directories:
            lines += [f"{directory}: {_space(directory)}"]
            lines += [f"  {_line(point)}" for point in points if _holds(point, directory)]
        return "\n".join([*lines, ""])

    def _process(self) -> str:
        pid = self._client.get("/api/v2/status")["pid"]
        directory = _PROC / str(pid)
        descriptors = Counter(_kind(target) for target in host.descriptor_targets(directory))
        kinds = [f"{count:>7} {kind}" for kind, count in descriptors.most_common()]
        texts = [host.text_of(directory / name) for name in ("status", "limits", "cgroup")]
        return "\n".join([*texts, "open descriptors:", *kinds, ""])


def _docker_files(source: config.Source) -> list[str]:
    if not source.docker_config:
        return []
    path = Path(source.docker_config)
    names = (".dockerconfigjson", "config.json") if path.is_dir() else ("",)
    return [str(path / name) for name in names]


def _program(*command: str) -> str:
    """What a program says; credentials of its environment are not its business."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PROGRAM_TIMEOUT_S,
    )
    return done.stdout or f"{' '.join(command)}: {done.stderr}\n"


def _kernel_lines(said: str) -> Iterator[str]:
    """What of the kernel's log may have to do with us."""
    for line in said.splitlines(keepends=True):
        if _RELEVANT.search(line):
            yield line


def _fscache() -> str:
    tables = sorted(path for path in _FSCACHE.glob("*") if path.is_file())
    if not tables:
        return f"no {_FSCACHE}\n"
    return "\n".join(f"{path}:\n{host.text_of(path)}" for path in tables)


def _line(point: MountPoint) -> str:
    options = ",".join(f"{key}={value}" if value else key for key, value in point.options)
    return f"{point.source} on {point.target} type {point.fs_type} ({options})"


def _holds(point: MountPoint, directory: str) -> bool:
    return os.path.commonpath([point.target, directory]) == point.target


def _space(directory: str) -> str:
    try:
        state = os.statvfs(directory)
    except OSError as error:
        return str(error.strerror)
    blocks = f"{state.f_bavail} of {state.f_blocks} blocks of {state.f_frsize} bytes"
    return f"{blocks}, {state.f_ffree} of {state.f_files} files are free"


def _kind(target: str) -> str:
    """`socket:[12]` and the like, without their numbers."""
    return target if target.startswith(("/dev/", "anon_inode:")) else target.partition(":")[0]
