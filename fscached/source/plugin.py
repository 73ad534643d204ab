"""Programs that hand out credentials: asked on standard input, they answer on standard output."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, cast

ANSWER_LIMIT_BYTES: Final = 64 << 10


class _Program(asyncio.SubprocessProtocol):
    """Collects what a program prints, up to the limit: one that prints more is ended."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data
        if len(self.output) > ANSWER_LIMIT_BYTES:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def ask(
    command: Sequence[str],
    question: bytes,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[int | None, bytes]:
    """Status and output of a program; the status of one that was ended is not 0. Without an
    `environment` it has ours.

    Raises OSError when it cannot be run, TimeoutError after `timeout_s` seconds; it is ended then.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout_s):
        transport, program = await loop.subprocess_exec(
            _Program, *command, stderr=asyncio.subprocess.DEVNULL, env=environment
        )
        try:
            stdin = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
            stdin.write(question)
            stdin.close()
            await program.ended
            return transport.get_returncode(), bytes(program.output)
        finally:
            transport.close()  # kills it, if it still runs
