"""The transcribed ABI against the building machine's own headers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cdefs
from cdefs import cachefiles, fanotify
from cdefs._abi import ffi, lib

HEADERS = (
    *("linux/cachefiles.h", "linux/falloc.h", "linux/fanotify.h", "linux/mount.h", "linux/sched.h"),
)

CONSTANTS = sorted(
    name for name in dir(lib) if name.isupper() and name[:3] not in {"MNT", "UMO", "SLO"}
)

FIELDS = {
    "cachefiles_msg": ["msg_id", "opcode", "len", "object_id", "data"],
    "cachefiles_open": ["volume_key_size", "cookie_key_size", "fd", "flags", "data"],
    "cachefiles_read": ["off", "len"],
    "fanotify_event_metadata": [
        *("event_len", "vers", "reserved", "metadata_len", "mask", "fd", "pid"),
    ],
    "fanotify_event_info_header": ["info_type", "pad", "len"],
    "fanotify_event_info_range": ["hdr", "pad", "offset", "count"],
    "fanotify_response": ["fd", "response"],
}

LINUX_6_14 = {"FAN_PRE_ACCESS", "FAN_EVENT_INFO_TYPE_RANGE", "FAN_ERRNO_SHIFT"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program says: `NAME` for constants, `struct`, `struct.field` for layouts, bytes."""
    expressions = {name: name for name in CONSTANTS}
    for struct, fields in FIELDS.items():
        expressions[struct] = f"sizeof(struct {struct})"
        expressions |= {f"{struct}.{f}": f"offsetof(struct {struct}, {f})" for f in fields}
    return run_c(tmp_path_factory.mktemp("headers"), HEADERS, expressions)


def run_c(directory: Path, headers: tuple[str, ...], expressions: dict[str, str]) -> dict[str, int]:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc")
    lines = [f"#include <{header}>" for header in ("fcntl.h", "stddef.h", "stdio.h", *headers)]
    prints = [
        f'#if {guard(name)}\nprintf("%s %lld\\n", "{name}", (long long)({value}));\n#endif'
        for name, value in expressions.items()
    ]
    source = directory / "measure.c"
    source.write_text("\n".join([*lines, "int main(void) {", *prints, "return 0; }"]))
    program = source.with_suffix("")
    subprocess.run([compiler, "-D_GNU_SOURCE", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, output.splitlines())}


def guard(name: str) -> str:
    """When the headers must know a name: those of Debian 12 end before Linux 6.14."""
    newer = name in LINUX_6_14 or name.startswith("fanotify_event_info_range")
    return "defined FAN_PRE_ACCESS" if newer else "1"


def test_constants_are_the_headers(measured: dict[str, int]) -> None:
    """Every constant has the value it has in C."""
    known = [name for name in CONSTANTS if name in measured]
    assert set(CONSTANTS) - set(known) <= LINUX_6_14
    assert {name: getattr(lib, name) for name in known} == {name: measured[name] for name in known}


def test_umount_flags_are_libcs(tmp_path: Path) -> None:
    """The two flags no kernel header exports are those of <sys/mount.h>."""
    flags = {"MNT_DETACH": "MNT_DETACH", "UMOUNT_NOFOLLOW": "UMOUNT_NOFOLLOW"}
    measured = run_c(tmp_path, ("sys/mount.h",), flags)
    assert measured == {"MNT_DETACH": lib.MNT_DETACH, "UMOUNT_NOFOLLOW": lib.UMOUNT_NOFOLLOW}


@pytest.mark.parametrize("struct", FIELDS)
def test_layouts_are_the_headers(struct: str, measured: dict[str, int]) -> None:
    """Every field lies where C puts it."""
    if struct not in measured:
        pytest.skip(f"these kernel headers have no struct {struct} (Linux 6.14 has)")
    assert ffi.sizeof(f"struct {struct}") == measured[struct]
    offsets = {f: ffi.offsetof(f"struct {struct}", f) for f in FIELDS[struct]}
    assert offsets == {f: measured[f"{struct}.{f}"] for f in FIELDS[struct]}


def test_struct_formats_follow_the_layouts(measured: dict[str, int]) -> None:
    """The formats the hot path unpacks with are as long as the C structures."""
    header = measured["cachefiles_msg"]
    assert cachefiles.MESSAGE.size == header
    assert cachefiles.OPEN.size == measured["cachefiles_open"]
    assert cachefiles.READ.size == header + measured["cachefiles_read"]
    assert fanotify.METADATA.size == measured["fanotify_event_metadata"]
    assert ffi.sizeof("struct fanotify_event_info_range") == fanotify.RANGE.size


def test_every_declaration_is_compared() -> None:
    """Nothing is declared in the `.h` files that these tests do not look at."""
    declared = "".join(path.read_text() for path in Path(cdefs.__file__).parent.glob("*.h"))
    assert set(re.findall(r"^struct (\w+)", declared, re.MULTILINE)) == {
        *FIELDS,
        "attendant",
        "attended",
    }
    assert set(re.findall(r"^#define (\w+)", declared, re.MULTILINE)) <= set(dir(lib))
