"""Stands in for the daemon in supervisor tests: reports who it is and does what it is told.

argv: the path of the test's socket. It connects, sends one JSON line about itself, then obeys one
command per line and answers each with one line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from fscached.control.notify import API, FdStore, alive, heartbeat_s, notify

store = FdStore()
fds = store.take()
listener = socket.socket(fileno=fds.pop(API)) if API in fds else None
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[1])


def say(what: object) -> None:
    channel.sendall(json.dumps(what).encode() + b"\n")  # unbuffered: also from a signal handler


def terminated(number: int, _: object) -> None:
    say("SIGTERM")
    os._exit(0)


signal.signal(signal.SIGTERM, terminated)
say(
    {
        "pid": os.getpid(),
        "arguments": sys.argv[2:],
        "heartbeat_s": heartbeat_s(os.environ),
        "group": os.getpgid(0),
        "inherited": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
        "stored": {name: os.fstat(fd).st_ino for name, fd in fds.items()},
        "text": {name: os.pread(fd, 99, 0).decode() for name, fd in fds.items()},
    }
)
for line in channel.makefile("r"):
    verb, *words = line.split()
    if verb == "store":
        memory = os.memfd_create(words[0])
        os.write(memory, words[1].encode())
        store.put(words[0], memory)
        say(os.fstat(memory).st_ino)
        os.close(memory)
    elif verb == "remove":
        notify("FDSTOREREMOVE=1", f"FDNAME={words[0]}", environment=os.environ)
        say("removed")
    elif verb == "ready":
        store.ready("well")
        say("ready")
    elif verb == "alive":
        alive(os.environ)
        say("alive")
    elif verb == "answer":
        assert listener
        with listener.accept()[0] as asker:
            asker.sendall(asker.recv(99))
        say("answered")
    elif verb == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("deaf")
    elif verb == "impostor":
        if os.fork() == 0:
            memory = os.memfd_create("state")
            notify("FDSTORE=1", "FDNAME=state", fds=[memory], environment=os.environ)
            os._exit(0)
        os.wait()
        say("sent")
    elif verb == "store-and-die":
        memory = os.memfd_create(words[0])
        os.write(memory, words[1].encode())
        store.put(words[0], memory)
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "exit":
        os._exit(int(words[0]))
