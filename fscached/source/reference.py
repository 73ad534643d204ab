"""Names of images, as people write them: `[host[:port]/]repository[:tag][@digest]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

DEFAULT_HOST: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
_NAME_LIMIT: Final = 255

# The grammar of distribution's reference package; only sha256 digests are used for images here.
_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY: Final = re.compile(rf"{_PART}(?:/{_PART})*")
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
HOST: Final = re.compile(
    rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\])(?::[0-9]{{1,5}})?"
)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class ReferenceError(ValueError):
    """A text that names no image; its message says what a name looks like."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One image. With a digest the tag is only a remark."""

    host: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a name; host, `library/` and `latest` have docker's defaults.

        Raises ReferenceError.
        """
        name, at, digest = text.partition("@")
        host, repository = _split_host(name)
        repository, colon, tag = repository.partition(":")
        if host == DEFAULT_HOST and "/" not in repository:
            repository = f"library/{repository}"
        if (
            not HOST.fullmatch(host)
            or not REPOSITORY.fullmatch(repository)
            or len(host) + 1 + len(repository) > _NAME_LIMIT
            or (colon and not _TAG.fullmatch(tag))
            or (at and not _DIGEST.fullmatch(digest))
        ):
            raise ReferenceError(
                f"{text[:_NAME_LIMIT]!r} names no image: write "
                "[host[:port]/]repository[:tag][@sha256:<64 hex digits>] in lower case"
            )
        return cls(host, repository, tag or ("" if digest else DEFAULT_TAG), digest)

    @property
    def name(self) -> str:
        """What the registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag

    @property
    def registry(self) -> str:
        """`host[:port]` to connect to; Docker Hub's has another name than its images."""
        return "registry-1.docker.io" if self.host == DEFAULT_HOST else self.host

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def _split_host(name: str) -> tuple[str, str]:
    """docker's rule: the first part is a host if it looks like one, or is localhost."""
    first, slash, rest = name.partition("/")
    if slash and (
        first == "localhost" or any(mark in first for mark in ".:") or not first.islower()
    ):
        return ("docker.io", rest) if first == "index.docker.io" else (first, rest)
    return DEFAULT_HOST, name
