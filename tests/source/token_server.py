"""A stand-in for a token server; the tokens it signs are real, docker-registry checks them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from tests.source.faulty import Seen, answer

SERVICE = "the registry"
# docker-registry takes a token this much longer than it says (registry/auth/token, Leeway).
_LEEWAY_S = 60


class TokenServer:
    """Gives a token for what is asked to those who send `authorization`, or to all for None."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.roots = directory / "roots.pem"
        authority.cert_pem.write_to_path(self.roots)
        signer = authority.issue_cert("issuer.example.org")
        certificate = x509.load_pem_x509_certificate(signer.cert_chain_pems[0].bytes())
        key = serialization.load_pem_private_key(signer.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._chain = [
            base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
        ]
        self.authorization: str | None = None
        self.life_s = 300
        self.expires = False
        """Whether docker-registry is to refuse a token after `life_s`, not only be told so."""

    def auth(self, realm: str) -> dict[str, object]:
        """docker-registry's configuration."""
        token = {
            "realm": realm,
            "service": SERVICE,
            "issuer": "issuer",
            "rootcertbundle": str(self.roots),
        }
        return {"token": token}

    async def serve(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        query = parse_qs(urlsplit(seen.target).query)
        if self.authorization not in (None, seen.headers.get("authorization")):
            await answer(401, body=b'{"details": "incorrect username or password"}')(seen, writer)
            return
        kind, name, actions = query["scope"][0].split(":")
        token = self._sign([{"type": kind, "name": name, "actions": actions.split(",")}])
        body = json.dumps({"token": token, "expires_in": self.life_s}).encode()
        await answer(200, {"Content-Type": "application/json"}, body)(seen, writer)

    def _sign(self, access: list[dict[str, object]]) -> str:
        now = int(time.time())
        header = {"typ": "JWT", "alg": "ES256", "x5c": self._chain}
        claims = {
            "iss": "issuer",
            "sub": "somebody",
            "aud": SERVICE,
            "exp": now + self.life_s - _LEEWAY_S if self.expires else now + 300,
            "nbf": now - 2 * _LEEWAY_S,
            "iat": now - 2 * _LEEWAY_S,
            "jti": "1",
            "access": access,
        }
        text = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
        signature = self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = utils.decode_dss_signature(signature)
        return f"{text}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
