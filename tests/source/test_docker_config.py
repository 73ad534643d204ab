"""Credentials in docker's config.json and from its helpers."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, Kind, Secret
from fscached.source.docker_config import DockerConfig, default_path

ALICE = Credential("alice", Secret("open:sesame"))
ENCODED = base64.b64encode(b"alice:open:sesame").decode()


def config(directory: Path, **document: object) -> DockerConfig:
    path = directory / "config.json"
    path.write_text(json.dumps(document))
    return DockerConfig(path)


Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a script into the path as the credential helper `test`."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "docker-credential-test"

    def install(script: str) -> None:
        path.write_text(script)
        path.chmod(0o755)

    return install


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("r.org", "r.org"),
        ("r.org:5000", "r.org:5000"),
        ("https://r.org", "r.org"),
        ("http://r.org/v2/", "r.org"),
        ("https://index.docker.io/v1/", "registry-1.docker.io"),
        ("docker.io", "registry-1.docker.io"),
    ],
)
@pytest.mark.asyncio
async def test_hosts(tmp_path: Path, key: str, host: str) -> None:
    """An entry is found under every name docker writes, and only for its host."""
    keychain = config(tmp_path, auths={key: {"auth": ENCODED}})
    assert await keychain.find(f"{host}/a/b") == ALICE
    assert await keychain.find("other.org/a/b") is None
    assert await keychain.find(f"{host}.evil.org/a/b") is None


@pytest.mark.asyncio
async def test_a_repository_has_its_own(tmp_path: Path) -> None:
    """podman's and Kubernetes' keys may name a path; the longest that fits is taken."""
    entries = {
        key: {"username": key, "password": "p"}
        for key in ("r.org", "r.org/team", "r.org/team/app", "*.r.org")
    }
    keychain = config(tmp_path, auths=entries)
    for image, key in (
        ("r.org/other", "r.org"),
        ("r.org/team/app", "r.org/team/app"),
        ("r.org/team/web", "r.org/team"),
        ("eu.r.org/team", "*.r.org"),
    ):
        assert await keychain.find(image) == Credential(key, Secret("p"))


@pytest.mark.asyncio
async def test_a_mounted_secret(tmp_path: Path) -> None:
    """A directory stands for the secret in it, which Kubernetes replaces by turning a link."""
    keychain = DockerConfig(tmp_path)
    assert await keychain.find("r.org/a") is None
    (tmp_path / ".dockerconfigjson").symlink_to("..data/.dockerconfigjson")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        auths = {"r.org": {"username": name, "password": "p"}}
        (tmp_path / name / ".dockerconfigjson").write_text(json.dumps({"auths": auths}))
        (tmp_path / "..new").symlink_to(name)
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert await keychain.find("r.org/a") == Credential(name, Secret("p"))


@pytest.mark.parametrize(
    ("entry", "credential"),
    [
        ({"username": "alice", "password": "open:sesame"}, ALICE),
        (
            {"auth": ENCODED, "identitytoken": "refresh"},
            Credential("", Secret("refresh"), Kind.IDENTITY),
        ),
        ({"registrytoken": "ready"}, Credential("", Secret("ready"), Kind.BEARER)),
        ({}, None),
    ],
)
@pytest.mark.asyncio
async def test_forms(tmp_path: Path, entry: dict[str, str], credential: Credential | None) -> None:
    """All forms of an entry."""
    assert await config(tmp_path, auths={"r.org": entry}).find("r.org") == credential


@pytest.mark.asyncio
async def test_no_file(tmp_path: Path) -> None:
    """Where docker was never logged in, nobody has a credential."""
    assert await DockerConfig(tmp_path / "gone.json").find("r.org") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"auths": 3}',
        '{"auths": {"r.org": {"auth": "sesame!"}}}',
        '{"credsStore": "../../sesame"}',
        '{"auths": {"r.org": {"auth": "c2VzYW1l"}}, "x": "' + "x" * (1 << 20) + '"}',
        '{"x": ' + "[" * 100_000,
    ],
)
@pytest.mark.asyncio
async def test_bad_files(tmp_path: Path, text: str) -> None:
    """The error names the file and what to do, and repeats no value of it that is a secret."""
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"config\.json.*docker login") as caught:
        await DockerConfig(path).find("r.org")
    assert caught.value.fault is Fault.LOCAL
    assert "sesame!" not in str(caught.value) and "c2Vz" not in str(caught.value)


@pytest.mark.asyncio
async def test_a_new_login_is_seen(tmp_path: Path) -> None:
    """The file is read anew for every question."""
    keychain = config(tmp_path)
    assert await keychain.find("r.org") is None
    config(tmp_path, auths={"r.org": {"auth": ENCODED}})
    assert await keychain.find("r.org") == ALICE


@pytest.mark.parametrize(
    "document",
    [
        {"credHelpers": {"r.org": "test"}},
        {"credsStore": "test", "auths": {"r.org": {}}},
        {"credsStore": "test"},
        {"credHelpers": {"r.org": "test"}, "credsStore": "none", "auths": {"r.org": {"auth": "x"}}},
    ],
)
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_helpers(
    tmp_path: Path,
    install: Install,
    document: dict[str, object],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """The helper gets the host on its standard input; a host's own beats the store."""
    install(
        '#!/bin/sh\n[ "$1" = get ] && read host\n'
        'printf \'{"ServerURL": "%s", "Username": "%s", "Secret": "s"}\' "$host" "$host"\n'
    )
    with asyncio.Runner(loop_factory=new_loop) as runner:
        found = runner.run(config(tmp_path, **document).find("r.org"))
    assert found == Credential("r.org", Secret("s"))


@pytest.mark.asyncio
async def test_a_helper_with_an_identity_token(tmp_path: Path, install: Install) -> None:
    """A user called <token> means that the secret is to be traded."""
    install('#!/bin/sh\necho \'{"Username": "<token>", "Secret": "refresh"}\'\n')
    found = await config(tmp_path, credsStore="test").find("r.org")
    assert found == Credential("<token>", Secret("refresh"), Kind.IDENTITY)


@pytest.mark.asyncio
async def test_a_helper_that_knows_nothing(tmp_path: Path, install: Install) -> None:
    """Its words for that are no failure."""
    install("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n")
    assert await config(tmp_path, credsStore="test").find("r.org") is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\necho sesame\nexit 3\n", "status 3"),
        ("#!/bin/sh\necho sesame\n", "JSON"),
        ("#!/bin/sh\nexec cat /dev/zero\n", "failed"),
        ("#!/bin/sh\nexec sleep 60\n", "took over 0.3 s"),
        ("#!/no/such/shell\n", "No such file"),
    ],
)
@pytest.mark.asyncio
async def test_bad_helpers(tmp_path: Path, install: Install, script: str, says: str) -> None:
    """A helper that fails, hangs or never ends its output is an error without its output."""
    install(script)
    config(tmp_path, credsStore="test")
    limit_s = 0.3 if "took" in says else 20
    keychain = DockerConfig(tmp_path / "config.json", helper_timeout_s=limit_s)
    with pytest.raises(SourceError, match=f"docker-credential-test.*{says}") as caught:
        await keychain.find("r.org")
    assert caught.value.fault is Fault.LOCAL and "sesame" not in str(caught.value)


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docker's own place first, then podman's, and docker's when there is neither."""
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".docker" / "config.json"
    podman = tmp_path / ".config" / "containers" / "auth.json"
    podman.parent.mkdir(parents=True)
    podman.write_text("{}")
    assert default_path() == podman
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert default_path() == tmp_path / "config.json"
