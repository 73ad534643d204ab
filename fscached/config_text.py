"""The text of a configuration: read from its file, decoded, its names checked. Knows no key."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any, ClassVar, Final, TypeAlias, get_args

import msgspec

from fscached.failure import Failure
from fscached.malformed import MALFORMED

FILE_LIMIT_BYTES: Final = 1 << 20

Tables: TypeAlias = Mapping[str, type[msgspec.Struct]]
"""By their names. A key's type is `Annotated`, and may be a table or many of one itself."""


class ConfigError(Failure):
    """The configuration cannot be used: which file, which table, which key, and what would do."""

    exit_code: ClassVar[int] = 2


def read(path: str | os.PathLike[str]) -> str:
    """The text of a file. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}",
            "give an existing file with --config, or leave it out for the defaults",
            where=os.fspath(path),
        ) from None
    if len(data) > FILE_LIMIT_BYTES:
        raise ConfigError(
            f"larger than {FILE_LIMIT_BYTES} bytes",
            "give a file with fscached's or nydusd's settings",
            where=os.fspath(path),
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 at byte {error.start}", "save it as UTF-8", where=os.fspath(path)
        ) from None


def is_json(text: str) -> bool:
    """No TOML begins so."""
    return text.lstrip().startswith("{")


def decode(text: str, origin: str) -> dict[str, Any]:
    """What a TOML or JSON text says. `origin` is its name in errors. Raises ConfigError."""
    try:
        if is_json(text):
            return msgspec.json.decode(text, type=dict[str, Any])
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}", "mend that line", where=origin) from None
    except MALFORMED as error:
        raise ConfigError(f"not JSON: {error}", "mend that place", where=origin) from None


def refuse_unknown(raw: Mapping[str, Any], tables: Tables, origin: str) -> None:
    """One ConfigError for the first name that is not in `tables`, with the nearest one that is."""
    for table, values in raw.items():
        if table not in tables:
            raise ConfigError(
                f"[{table}]: unknown table", _nearest_table(table, tables), where=origin
            )
        if isinstance(values, dict):
            _refuse_keys(values, tables[table], table, tables, origin)


def inner_table(annotation: Any) -> type[msgspec.Struct] | None:
    """The table that a key holds, or holds many of."""
    kind, _ = get_args(annotation)
    for one in (kind, *get_args(kind)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def place(path: str) -> str:
    """`table.key` as people write it."""
    table, _, key = path.partition(".")
    return f"[{table}] {key}".rstrip() if table else "the file"


def limits(meta: msgspec.Meta) -> str:
    """Of a number; empty for what has none."""
    bounds = {
        "at least": meta.ge,
        "more than": meta.gt,
        "at most": meta.le,
        "less than": meta.lt,
        "a multiple of": meta.multiple_of,
    }
    return ", ".join(f"{words} {bound:_}" for words, bound in bounds.items() if bound is not None)


def what_would_do(path: str, tables: Tables) -> str:
    """Instead of a wrong value at `path`, as in `fetch.deadline_s`: of a number its limits."""
    name, *keys = re.sub(r"\[[^]]*\]", "", path).split(".")
    table = tables.get(name)
    for key in keys:
        fields = {field.name: field for field in msgspec.structs.fields(table)} if table else {}
        if key not in fields:
            break
        table = inner_table(fields[key].type)
        if table is None and (said := limits(get_args(fields[key].type)[1])):
            return f"give a number that is {said}, or leave it out for {fields[key].default!r}"
    return "`fscached config` prints every key with its default and limits"


def _refuse_keys(
    values: dict[str, Any], kind: type[msgspec.Struct], where: str, tables: Tables, origin: str
) -> None:
    """Those of one table, and of the tables in it."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            remedy = _nearest_key(where, kind, key, tables)
            raise ConfigError(f"[{where}] {key}: unknown key", remedy, where=origin)
        inner = inner_table(fields[key].type)
        for one in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(one, dict):
                _refuse_keys(one, inner, f"{where}.{key}", tables, origin)


def _nearest_table(table: str, tables: Tables) -> str:
    if near := difflib.get_close_matches(table, tables, n=1):
        return f"did you mean [{near[0]}]?"
    if homes := _homes(table, tables):
        return f"did you mean {table} in [{homes[0]}]?"
    return f"the tables are {', '.join(f'[{name}]' for name in tables)}"


def _nearest_key(where: str, kind: type[msgspec.Struct], key: str, tables: Tables) -> str:
    known = kind.__struct_fields__
    if homes := _homes(key, tables):
        return f"did you mean {key} in [{homes[0]}]?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]}?"
    return f"the keys of [{where}] are {', '.join(known)}"


def _homes(key: str, tables: Tables) -> list[str]:
    return [name for name, table in tables.items() if key in table.__struct_fields__]
