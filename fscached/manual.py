"""The configuration for people: every key with its meaning, its limits and its value, as TOML."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

import msgspec

from fscached.config import TABLES, Config, Table
from fscached.config_text import inner_table, limits
from fscached.redaction import HIDDEN


def shareable(config: Config) -> Config:
    """The same without credentials: headers for mirrors are the only ones that it can hold."""
    source = config.source
    mirrors = tuple(
        msgspec.structs.replace(mirror, headers=dict.fromkeys(mirror.headers, HIDDEN))
        for mirror in source.mirrors
    )
    return msgspec.structs.replace(config, source=msgspec.structs.replace(source, mirrors=mirrors))


def explain(config: Config) -> str:
    """All of it, with the values given; `config.parse` reads it back."""
    head = "# Every setting of fscached. A key or a table that is left out has its default.\n"
    return head + "".join(_explain_table(name, getattr(config, name)) for name in TABLES)


def _explain_table(name: str, table: Table) -> str:
    lines = [f"\n# {(type(table).__doc__ or '').splitlines()[0]}", f"[{name}]"]
    for field in msgspec.structs.fields(table):
        lines.append(f"# {_meaning(field.type)}")
        if (inner := inner_table(field.type)) is not None:
            keys = msgspec.structs.fields(inner)
            lines += [f"#   {key.name}: {_meaning(key.type)}" for key in keys]
        lines.append(f"{field.name} = {_toml(getattr(table, field.name))}")
    return "\n".join(lines) + "\n"


def _meaning(annotation: Any) -> str:
    kind, meta = get_args(annotation)
    said = ", ".join(get_args(kind)) if get_origin(kind) is Literal else limits(meta)
    return f"{meta.description} ({said})" if said else f"{meta.description}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Table):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, dict):
        pairs = (f"{_toml_key(key)} = {_toml(inner)}" for key, inner in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key)
