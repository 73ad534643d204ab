"""Kubelet's credential providers: their file, their protocol, what may be kept for how long."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, Secret
from fscached.source.credential_provider import CredentialProviders, seconds

CONFIG = """
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: cloud
    matchImages: ["*.dkr.cloud.example", "r.org:5000/team"]
    defaultCacheDuration: 1h
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get, "--all"]
    env:
      - {name: PROFILE, value: nodes}
"""
IMAGE = "eu.dkr.cloud.example/app"
ALICE = Credential("alice", Secret("open sesame"))


class Cloud:
    """A provider's program that writes down what it is asked, and answers what it is told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "providers.yaml"
        self.file.write_text(CONFIG)
        self._program = directory / "cloud"
        self._answer = directory / "answer.json"
        self._asked = directory / "asked"
        self._asked.touch()
        self.program(f"cat {self._answer}")
        self.answers()

    def program(self, end: str) -> None:
        self._program.write_text(
            f'#!/bin/sh\n{{ echo "$PROFILE $*"; cat; echo; }} >>{self._asked}\n{end}\n'
        )
        self._program.chmod(0o755)

    def answers(self, **changes: Any) -> None:
        login = {"username": "alice", "password": "open sesame"}
        answer = {
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "kind": "CredentialProviderResponse",
            "cacheKeyType": "Image",
            "auth": {"*.dkr.cloud.example": login, "r.org:5000": login},
        }
        self._answer.write_text(json.dumps(answer | changes))

    @property
    def asked(self) -> list[str]:
        return self._asked.read_text().splitlines()[1::2]

    @property
    def called(self) -> list[str]:
        return self._asked.read_text().splitlines()[::2]

    def keychain(self, timeout_s: float = 20) -> CredentialProviders:
        return CredentialProviders(self.file, self.directory, timeout_s=timeout_s)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    """One provider, its program and its file."""
    return Cloud(tmp_path)


@pytest.mark.asyncio
async def test_a_provider_is_asked(cloud: Cloud) -> None:
    """By the documented request, with its arguments and environment."""
    assert await cloud.keychain().find(IMAGE) == ALICE
    assert cloud.called == ["nodes get --all"]
    assert json.loads(cloud.asked[0]) == {
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "kind": "CredentialProviderRequest",
        "image": IMAGE,
    }


@pytest.mark.asyncio
async def test_only_for_its_images(cloud: Cloud) -> None:
    """Other images are none of its business, and what it prints for others is not ours."""
    keychain = cloud.keychain()
    for image in ("dkr.cloud.example/app", "r.org:5000/other", "r.org/team"):
        assert await keychain.find(image) is None
    assert cloud.asked == []
    cloud.answers(auth={"other.org": {"username": "u", "password": "p"}})
    assert await keychain.find(IMAGE) is None


@pytest.mark.parametrize(
    ("kind", "runs"), [("Image", [1, 2, 3]), ("Registry", [1, 1, 2]), ("Global", [1, 1, 1])]
)
@pytest.mark.asyncio
async def test_what_an_answer_is_kept_for(cloud: Cloud, kind: str, runs: list[int]) -> None:
    """One image, one registry, or everything of the provider's."""
    cloud.answers(cacheKeyType=kind)
    keychain, counts = cloud.keychain(), []
    for image in (IMAGE, "eu.dkr.cloud.example/web", "us.dkr.cloud.example/app"):
        assert await keychain.find(image) == ALICE
        assert await keychain.find(image) == ALICE
        counts.append(len(cloud.asked))
    assert counts == runs


@pytest.mark.parametrize(
    ("duration", "shift_s", "runs"),
    [(None, 3599, 1), (None, 3601, 2), ("2m", 119, 1), ("2m", 121, 2), ("0s", 0, 2)],
)
@pytest.mark.asyncio
async def test_how_long_an_answer_is_kept(
    cloud: Cloud,
    monkeypatch: pytest.MonkeyPatch,
    duration: str | None,
    shift_s: float,
    runs: int,
) -> None:
    """As long as it says, else as the file has it; 0 is not at all."""
    loop, past_s = asyncio.get_running_loop(), 0.0
    clock, began = loop.time, loop.time()
    monkeypatch.setattr(loop, "time", lambda: began if not past_s else clock() + past_s - 1)
    cloud.answers(cacheDuration=duration)
    keychain = cloud.keychain()
    await keychain.find(IMAGE)
    past_s = shift_s or 1
    await keychain.find(IMAGE)
    assert len(cloud.asked) == runs


@pytest.mark.asyncio
async def test_one_run_for_many(cloud: Cloud) -> None:
    """All who want an image's credential at once share one run."""
    keychain = cloud.keychain()
    assert await asyncio.gather(*(keychain.find(IMAGE) for _ in range(5))) == [ALICE] * 5
    assert len(cloud.asked) == 1


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("echo sesame; exit 3", "status 3"),
        ("echo sesame", "did not print"),
        ("exec cat /dev/zero", "status"),
        ("exec sleep 60", "took over 0.3 s"),
    ],
    ids=["fails", "is no provider", "babbles", "hangs"],
)
@pytest.mark.asyncio
async def test_bad_programs(cloud: Cloud, end: str, says: str) -> None:
    """One that fails, babbles or hangs is an error that names it and repeats nothing."""
    cloud.program(end)
    with pytest.raises(SourceError, match=f"cloud.*{says}") as caught:
        await cloud.keychain(0.3 if "took" in says else 20).find(IMAGE)
    assert caught.value.fault is Fault.LOCAL and "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1alpha1", "apiVersion"),
        ("name: cloud", "name: ../cloud", "providers.*name"),
        ("    matchImages", "    tokenAttributes: {}\n    matchImages", "tokenAttributes"),
        ("1h", "soon", "no duration"),
        ("providers:", "providers: []\nothers:", "providers"),
        ("kind", "\tkind", "not YAML"),
    ],
)
@pytest.mark.asyncio
async def test_bad_files(cloud: Cloud, old: str, new: str, says: str) -> None:
    """The error names the file and the key."""
    cloud.file.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(SourceError, match=f"providers.yaml: .*{says}"):
        await cloud.keychain().find(IMAGE)


@pytest.mark.asyncio
async def test_no_file(tmp_path: Path) -> None:
    """One that is configured and not there is an error, unlike docker's."""
    with pytest.raises(SourceError, match="No such file"):
        await CredentialProviders(tmp_path / "absent", tmp_path).find(IMAGE)


@pytest.mark.parametrize(
    ("text", "length_s"),
    [("12h", 43200), ("1h30m", 5400), ("1.5h", 5400), ("6h0m0s", 21600), ("250ms", 0.25), ("0", 0)],
)
def test_durations(text: str, length_s: float) -> None:
    """As Go prints them."""
    assert seconds(text) == length_s


@pytest.mark.parametrize("text", ["", "12", "h", "1h 30m", "-1h", "1d", "١h"])
def test_no_durations(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(ValueError, match="no duration"):
        seconds(text)
