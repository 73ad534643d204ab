"""Connections of one priority: curl turned by the event loop, a reply for every request.

Every answer's status and headers are judged before its first byte is handed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import pycurl

from fscached.source import Fault
from fscached.source.content_range import RangeError, promised_bytes
from fscached.source.origin import USER_AGENT, Traffic, Trust
from fscached.source.outlet import Outlet
from fscached.source.request import Pace, Reply, Request
from fscached.source.window import Window, offer, round_trip_s, server

# Bodies of refusals are read up to this so that the connection can be used again.
DRAIN_LIMIT_BYTES: Final = 64 << 10
# curl reads ten buffers and more before it returns, and READs of what is resident wait meanwhile:
# with 256 KiB up to 5 ms, and a cold file comes through its mount with 385 MB/s instead of 424.
RECEIVE_BYTES: Final = 64 << 10
_SERVERS_LIMIT: Final = 64
STALL_CHECKS: Final = 4
_E_TOO_LARGE: Final = 100  # CURLE_TOO_LARGE of curl.h: headers without end; pycurl has no name

OPTIONS: Final[dict[int, Any]] = {
    pycurl.NOSIGNAL: 1,
    pycurl.BUFFERSIZE: RECEIVE_BYTES,
    pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
    pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
    pycurl.NOPROXY: "",  # not the environment's
    pycurl.TCP_KEEPALIVE: 1,
    pycurl.USERAGENT: USER_AGENT,
}
# Faults of curl's that no second try mends; all others are the network's.
_LASTING: Final = {
    pycurl.E_PEER_FAILED_VERIFICATION: Fault.PROTOCOL,
    pycurl.E_SSL_CACERT_BADFILE: Fault.LOCAL,
    pycurl.E_OUT_OF_MEMORY: Fault.LOCAL,
    pycurl.E_UNSUPPORTED_PROTOCOL: Fault.PROTOCOL,
    pycurl.E_URL_MALFORMAT: Fault.PROTOCOL,
    pycurl.E_FTP_WEIRD_SERVER_REPLY: Fault.PROTOCOL,
    _E_TOO_LARGE: Fault.PROTOCOL,
}


class Transfer:
    """One curl handle, used for one request after the other."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._lines: list[bytes] = []
        self._trust: Trust | None = None
        self._headers: tuple[str, ...] | None = None
        self._proxy: str | None = None
        self._pace = Pace(0, 0)
        curl = self.curl = pycurl.Curl()
        for option, value in lane.options.items():
            curl.setopt(option, value)
        curl.setopt(pycurl.HEADERFUNCTION, self._lines.append)
        # A view of curl's own buffer: 8 % of a 1 MiB read on loopback was the copy into bytes.
        curl.setopt(pycurl.WRITEFUNCTION, self._body, use_memoryview=True)

    async def run(
        self,
        request: Request,
        feed: Callable[[memoryview], None],
        traffic: Traffic,
        accepted: Callable[[], None] | None,
    ) -> Reply:
        self._request, self._feed, self._accepted = request, feed, accepted
        self._status, self._answer = 0, dict[str, str]()
        self._promised = self._received = self._fed = 0
        self._verdict: tuple[Fault, str] | None = None
        self._raised: BaseException | None = None
        self._progress = self._still_checks = 0
        self._lines.clear()
        self._prepare(request)
        self.future: asyncio.Future[Reply] = self._lane.loop.create_future()
        self._lane.add(self)
        try:
            reply = await self.future
        finally:
            self._lane.remove(self)
            # curl knows whether it came to sending: a refused connection is no request.
            traffic.requests += self.curl.getinfo(pycurl.REQUEST_SIZE) > 0
            traffic.received_bytes += self._received
            del self._feed, self._accepted
        if self._raised is not None:
            raise self._raised
        return reply

    def finish(self, code: int, text: str) -> None:
        """curl is done with it; 0 is success."""
        if not self.future.done():
            self.future.set_result(self._reply(code, text))

    def fail(self, fault: Fault, reason: str) -> None:
        """End it from outside."""
        self._verdict = fault, reason
        self.finish(0, "")

    def check_progress(self) -> bool:
        """Whether a byte or a header came since one of the last few checks."""
        progress = self._received + len(self._lines)
        self._still_checks = 0 if progress != self._progress else self._still_checks + 1
        self._progress = progress
        return self._still_checks < STALL_CHECKS

    def pause(self, how: int) -> None:
        # curl refuses while there is no connection; then the first byte finds the lane held.
        with suppress(pycurl.error):
            self.curl.pause(how)

    def forgive(self) -> None:
        """A transfer that was told to wait has not stalled."""
        self._still_checks = 0

    def _prepare(self, request: Request) -> None:
        curl = self.curl
        curl.setopt(pycurl.URL, request.url)
        curl.setopt(pycurl.RANGE, f"{request.start}-{request.end - 1}")
        if request.headers != self._headers:
            self._headers = request.headers
            curl.setopt(pycurl.HTTPHEADER, ["Accept-Encoding: identity", *request.headers])
        if (proxy := request.proxy or self._lane.outlet.of(request.url)) != self._proxy:
            self._proxy = proxy
            curl.setopt(pycurl.PROXY, proxy)
        if request.pace != self._pace:
            self._pace = request.pace
            curl.setopt(pycurl.LOW_SPEED_LIMIT, request.pace.bytes_s)
            curl.setopt(pycurl.LOW_SPEED_TIME, request.pace.seconds)
        if request.trust is not self._trust:
            self._trust = request.trust
            curl.setopt(pycurl.SSL_VERIFYPEER, request.trust.verify)
            curl.setopt(pycurl.SSL_VERIFYHOST, 2 if request.trust.verify else 0)
            curl.setopt(pycurl.CAINFO, request.trust.bundle)

    def _body(self, data: memoryview) -> int | None:
        lane = self._lane
        if lane.held:
            return pycurl.WRITEFUNC_PAUSE
        if self.future.done():  # given up, but its task has not run yet: not one byte more
            return -1
        try:
            if not self._status:
                self._judge()
            size = len(data)
            self._received += size
            if self._received > self._promised:
                return self._surplus()
            self._feed(data)
            self._fed += size
            if lane.windows:
                lane.received(size)
        except BaseException as error:  # curl would print it and carry on
            self._raised = error
            return -1
        return None

    def _judge(self) -> None:
        """Read status and headers, once, before the first byte of the body."""
        self._status, self._answer = _read_head(self._lines)
        if self._status not in (200, 206):
            return
        request = self._request
        try:
            self._promised = promised_bytes(self._status, self._answer, request.start, request.end)
        except RangeError as error:
            self._verdict = Fault.PROTOCOL, str(error)
        else:
            if self._accepted is not None:
                self._accepted()

    def _surplus(self) -> int | None:
        """A body nobody asked for: of a refusal it is drained, of anything else it ends here."""
        if self._promised:
            self._verdict = Fault.PROTOCOL, "the body goes on behind the range that was promised"
        if self._verdict is None and self._received <= DRAIN_LIMIT_BYTES:
            return None
        return -1

    def _reply(self, code: int, text: str) -> Reply:
        if not self._status and code == pycurl.E_OK:
            self._judge()
        fault, reason = self._verdict or self._ending(code, text)
        return Reply(self._status, self._answer, self._fed, fault, reason)

    def _ending(self, code: int, text: str) -> tuple[Fault | None, str]:
        refused_at_length = code == pycurl.E_WRITE_ERROR and not self._promised
        if code != pycurl.E_OK and not refused_at_length:
            return _LASTING.get(code, Fault.NETWORK), text or pycurl.easy_strerror(code)
        if self._fed < self._promised:
            return Fault.NETWORK, f"broke off after {self._fed} of {self._promised} bytes"
        return None, ""


class Lane:
    """The connections of one priority: a curl multi handle on the event loop."""

    def __init__(
        self,
        connections: int,
        options: dict[int, Any],
        outlet: Outlet,
        window: Callable[[], Window] | None = None,
    ) -> None:
        """`window` makes what a connection offers at first; None: the kernel decides."""
        self.loop = asyncio.get_running_loop()
        self.options = options
        if window is not None:
            self.options = options | {pycurl.SOCKOPTFUNCTION: partial(self._opened, window)}
        self.windows: dict[int, Window] = {}
        self._known: dict[object, int] = {}
        """What windows came to, by servers: a transfer that is given up takes its connection along,
        not what it has found out."""
        self._fd = -1
        self.outlet = outlet
        self.slots = asyncio.Semaphore(connections)
        self.held = False
        self.running: dict[pycurl.Curl, Transfer] = {}
        self.idle: list[Transfer] = []
        self._timer: asyncio.Handle | None = None
        self._interest: dict[int, int] = {}
        self._multi = multi = pycurl.CurlMulti()
        multi.setopt(pycurl.M_MAXCONNECTS, connections)
        multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        multi.setopt(pycurl.M_TIMERFUNCTION, self._schedule)

    def add(self, transfer: Transfer) -> None:
        self.running[transfer.curl] = transfer
        self._multi.add_handle(transfer.curl)
        self._turn(pycurl.SOCKET_TIMEOUT, 0)

    def remove(self, transfer: Transfer) -> None:
        """Forget a transfer; one that is under way loses its connection."""
        if self.running.pop(transfer.curl, None) is not None:
            self._multi.remove_handle(transfer.curl)

    def received(self, size_bytes: int) -> None:
        """So many bytes of use have come on the connection whose turn it is."""
        window = self.windows.get(self._fd)
        if window is not None and window.received(size_bytes, self.loop.time()):
            other = server(self._fd)
            offered = window.adapt(round_trip_s(self._fd), self._known.pop(other, 0))
            self._known[other] = offered
            if len(self._known) > _SERVERS_LIMIT:
                del self._known[next(iter(self._known))]
            offer(self._fd, offered)

    def hold(self) -> None:
        self.held = True
        for window in self.windows.values():
            window.pause()
        for transfer in self.running.values():
            transfer.pause(pycurl.PAUSE_RECV)

    def release(self) -> None:
        self.held = False
        for transfer in self.running.values():
            transfer.forgive()
            transfer.pause(pycurl.PAUSE_CONT)

    def close(self) -> None:
        for transfer in list(self.running.values()):
            transfer.fail(Fault.LOCAL, "the daemon is closing its connections")
            self.remove(transfer)
        while self.idle:
            self.idle.pop().curl.close()
        self._multi.close()
        self._schedule(-1)

    def _opened(self, window: Callable[[], Window], fd: int, _purpose: int) -> int:
        self.windows[fd] = window()
        return pycurl.SOCKOPT_OK

    def _turn(self, fd: int, events: int) -> None:
        self._fd = fd
        _, running = self._multi.socket_action(fd, events)
        if running < len(self.running):
            self._reap()

    def _reap(self) -> None:
        _, done, broken = self._multi.info_read()
        for curl in done:
            self._end(curl, pycurl.E_OK, "")
        for curl, code, text in broken:
            self._end(curl, code, text)

    def _end(self, curl: pycurl.Curl, code: int, text: str) -> None:
        transfer = self.running[curl]
        transfer.finish(code, text)
        self.remove(transfer)

    def _watch(self, what: int, fd: int, _multi: pycurl.CurlMulti, _data: object) -> None:
        """curl wants other events of a socket; IN and OUT are the bits of CSELECT_ too."""
        wanted = 0 if what == pycurl.POLL_REMOVE else what
        changed = wanted ^ self._interest.get(fd, 0)
        if changed & pycurl.POLL_IN:
            if wanted & pycurl.POLL_IN:
                self.loop.add_reader(fd, self._turn, fd, pycurl.CSELECT_IN)
            else:
                self.loop.remove_reader(fd)
        if changed & pycurl.POLL_OUT:
            if wanted & pycurl.POLL_OUT:
                self.loop.add_writer(fd, self._turn, fd, pycurl.CSELECT_OUT)
            else:
                self.loop.remove_writer(fd)
        if wanted:
            self._interest[fd] = wanted
        else:
            self._interest.pop(fd, None)

    def _schedule(self, timeout_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if timeout_ms >= 0:
            self._timer = self.loop.call_later(
                timeout_ms / 1000, self._turn, pycurl.SOCKET_TIMEOUT, 0
            )


def _read_head(lines: list[bytes]) -> tuple[int, dict[str, str]]:
    """Status and headers; after an interim answer (100, 103) only the last answer's count."""
    status, fields = 0, dict[str, str]()
    for line in lines:
        text = line.decode("latin-1")
        if text.startswith("HTTP/"):
            code = text.split(" ")[1][:3]  # curl has checked that it is there
            status, fields = int(code) if code.isdecimal() else 0, {}
        elif ":" in text:
            name, _, value = text.partition(":")
            key, value = name.strip().lower(), value.strip()
            fields[key] = f"{fields[key]}, {value}" if key in fields else value
    return status, fields
