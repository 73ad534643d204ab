"""What a text loses before it leaves the machine, and what it keeps."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.redaction import Redaction, secrets_in

SECRET = "hunter2-hunter2"
WORDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=40)


@pytest.mark.parametrize(
    "text",
    [
        f"password={SECRET}",
        f'registry_auth: "{SECRET}"',
        f"{{'access_key_secret': '{SECRET}', 'host': 'h'}}",
        f'{{"X-Auth-Token":"{SECRET}"}}',
        f'event="body was {{\\"auth\\": \\"{SECRET}\\"}}"',
        f'{{"token": "with \\" a quote {SECRET}"}}',
        f"AWS_SECRET_ACCESS_KEY={SECRET} other=1",
        f"https://ann:{SECRET}@host/",
        f"http://s3/?X-Amz-Signature={SECRET}",
        f"Authorization: Bearer {SECRET}",
    ],
)
def test_what_stands_beside_its_name_goes(text: str) -> None:
    """In logs, JSON, shells, URLs and headers."""
    assert SECRET not in Redaction().text(text)


@pytest.mark.parametrize(
    "text",
    [
        "time=1 level=info event=mounted fsid=abc blobs=3",
        "erofs on /mnt type erofs (ro,fsid=x,domain_id=y)",
        'credential_provider_config = ""',
    ],
)
def test_what_is_none_stays(text: str) -> None:
    """A report of asterisks helps nobody."""
    assert Redaction().text(text) == text


@given(WORDS, st.text(), st.text())
def test_what_is_known_goes_wherever_it_is(secret: str, before: str, after: str) -> None:
    """Without a name beside it, too."""
    assert secret not in Redaction([secret]).text(before + secret + after)


@given(WORDS)
def test_a_document_gives_its_secrets_away(password: str) -> None:
    """docker's, nydusd's, and the password within base64."""
    packed = base64.b64encode(f"ann:{password}".encode()).decode()
    document = {"auths": {"host": {"auth": packed}}, "backend": {"registry_token": password}}
    found = set(secrets_in(document))
    assert {packed, password, f"ann:{password}"} <= found
    said = json.dumps(Redaction(found).value({"text": f"got {password}", "list": [packed]}))
    assert password not in said and packed not in said


def test_values_keep_their_shape() -> None:
    """Numbers, lists and keys are as they were."""
    value = {"reads": 3, "token": SECRET, "images": [{"reference": "host/app:1"}], "auth": None}
    expected = {"reads": 3, "token": "***", "images": [{"reference": "host/app:1"}], "auth": None}
    assert Redaction().value(value) == expected
