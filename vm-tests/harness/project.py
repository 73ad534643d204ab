"""The project as a guest gets it: a site directory for Debian's Python, and `bin/fscached`."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from harness import command, store

ROOT = Path(__file__).resolve().parent.parent.parent
MOUNT = "/opt/fscached"
"""Where guests find `bin` and `site`; their init puts the one on PATH, the other on sys.path."""

LAUNCHER = """\
#!/usr/bin/python3
import sys
from {module} import {function}
sys.exit({function}())
"""


def version() -> str:
    """Changes when anything does that `install` copies."""
    contents = [(str(path.relative_to(ROOT)), path.read_bytes()) for path in _sources()]
    return store.key(_pyproject(), LAUNCHER, _declarations(), contents)


def install(directory: Path) -> None:
    """Put the project and everything it imports into `directory`/site, compiled to byte code."""
    site = directory / "site"
    shutil.copytree(_installed_dependencies(), site, symlinks=True)
    for path in _sources():
        target = site / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    shutil.copytree(_extension(), site, dirs_exist_ok=True)
    _compile(*(site / package for package in _packages()))
    (directory / "bin").mkdir()
    for name, entry in _pyproject()["project"]["scripts"].items():
        module, function = entry.split(":")
        launcher = directory / "bin" / name
        launcher.write_text(LAUNCHER.format(module=module, function=function))
        launcher.chmod(0o755)


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _dependencies() -> list[str]:
    return sorted(_pyproject()["project"]["dependencies"])


def _packages() -> list[str]:
    names = _pyproject()["tool"]["setuptools"]["packages"]
    return sorted({name.split(".")[0] for name in names})


def _sources() -> list[Path]:
    """The project's own Python files."""
    return sorted(path for name in _packages() for path in (ROOT / name).rglob("*.py"))


def _installed_dependencies() -> Path:
    """The dependencies, kept."""
    wanted = _dependencies()

    def build(site: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
        command.run([*pip, "--target", site, *wanted])
        _compile(site)

    return store.kept("dependencies", store.key(wanted, sys.version_info[:2]), build)


def _declarations() -> list[bytes]:
    """What the extension is compiled from."""
    cdefs = ROOT / "cdefs"
    return [path.read_bytes() for path in (cdefs / "build.py", *sorted(cdefs.glob("*.[ch]")))]


def _extension() -> Path:
    """The directory with the compiled `cdefs/_abi`, kept."""

    def build(directory: Path) -> None:
        program = "import sys; from cdefs.build import ffibuilder; ffibuilder.compile(sys.argv[1])"
        command.run([sys.executable, "-c", program, directory], cwd=ROOT)

    return store.kept("extensions", store.key(_declarations(), sys.version_info[:2]), build)


def _compile(*directories: Path) -> None:
    command.run([sys.executable, "-m", "compileall", "-q", "-j0", *directories])
