"""The configuration: defaults, limits, and errors that help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fscached import config, config_text, manual
from fscached.config import Config, ConfigError

SHIPPED = Path(__file__).parents[2] / "docs" / "fscached.toml"


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "f.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    """Every key has a default."""
    (path := tmp_path / "empty.toml").touch()
    assert config.load(path) == Config()


def test_the_shipped_file_is_the_defaults() -> None:
    """docs/fscached.toml is what `fscached config` prints, and reads back as the defaults."""
    assert SHIPPED.read_text() == manual.explain(Config())
    assert config.load(SHIPPED) == Config()


def test_without_a_path_the_default_file_is_read_when_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No --config: the file in /etc, or the defaults."""
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "fscached.toml")
    assert config.load() == Config()
    (tmp_path / "fscached.toml").write_text("[fetch]\ndeadline_s = 7")
    assert config.load().fetch.deadline_s == 7.0


def test_a_file_overrides_only_what_it_names() -> None:
    """Other keys and tables keep their defaults."""
    found = config.parse("[cache]\ndomain_id = ''", "f.toml")
    assert found == Config(cache=config.Cache(domain_id=""))


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ("[fetch]\nwindow_byte = 1", "f.toml: [fetch] window_byte:", "did you mean window_bytes?"),
        ("[fecth]", "f.toml: [fecth]:", "did you mean [fetch]?"),
        ("[source]\ndeadline_s = 1", "[source] deadline_s:", "did you mean deadline_s in [fetch]?"),
        ("window_bytes = 1", "[window_bytes]:", "did you mean window_bytes in [fetch]?"),
        ("[log]\nxyzzy = 1", "[log] xyzzy:", "the keys of [log] are level, file"),
        ("[xyzzy]", "[xyzzy]:", "the tables are [paths], [cache]"),
    ],
)
def test_a_misspelled_name_is_one_error_with_the_nearest_right_one(
    text: str, place: str, remedy: str
) -> None:
    """The error names the file, the table, the key and what was probably meant."""
    message = refused(text)
    assert place in message
    assert remedy in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[fetch]\nwindow_bytes = 5000", "[fetch] window_bytes: Expected `int` that's a multiple"),
        ("[fetch]\ndeadline_s = nan", "[fetch] deadline_s: Expected `float`"),
        ("[fetch]\ndeadline_s = inf", "[fetch] deadline_s: Expected `float` <= 3600"),
        ("[fetch]\nverify = 1", "[fetch] verify: Expected `bool`"),
        ("[fetch]\nwindow_bytes = 16777216", "[fetch]: Expected window_bytes <= window_limit"),
        (
            "[fetch]\non_source_outage = 'wait'\noutage_limit_s = 9",
            "[fetch]: Expected deadline_s <=",
        ),
        ("[cache]\nblock_stop_percent = 5", "[cache]: Expected block_stop_"),
        ("[cache]\nfile_run_percent = 2", "[cache]: Expected file_stop_"),
        ("[cache]\ndomain_id = 'a/b'", "[cache] domain_id: Expected `str` matching"),
        ('[cache]\ntag = "a\\n"', "[cache] tag: Expected `str` matching"),
        ("[paths]\nstate_directory = 'var'", "[paths] state_directory: Expected `str` matching"),
        ("[kernel]\ntransport = 'fuse'", "[kernel] transport: Invalid enum value 'fuse'"),
        ("[source]\ninsecure_registries = [1]", "[source] insecure_registries[0]: Expected `str`"),
        ("fetch = 3", "[fetch]: Expected `object`, got `int`"),
        ("[fetch", "not TOML: Expected ']'"),
    ],
)
def test_a_value_beyond_its_limits_is_refused(text: str, what: str) -> None:
    """The error names the key and the limit."""
    assert what in refused(text)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            "[fetch]\ndeadline_s = -1",
            "that is more than 0, at most 3_600, or leave it out for 30.0",
        ),
        ("[source]\nretries = -1", "that is at least 0, at most 100, or leave it out for 5"),
        (
            "[source]\nmirrors = [{host='http://m', timeout_s=-1}]",
            "that is at least 1, at most 300",
        ),
        ("[log]\nfile = 'x'", "`fscached config` prints every key"),
    ],
)
def test_a_number_beyond_its_limits_is_told_which_would_do(text: str, remedy: str) -> None:
    """With the default; what is no number has limits that are no sentence."""
    assert remedy in refused(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, no text, or far too large: one error each, with the path."""
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe")
    (huge := tmp_path / "huge").write_bytes(b"#" * (config_text.FILE_LIMIT_BYTES + 1))
    for path, what in [
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not UTF-8 at byte 0"),
        (huge, "larger than 1048576 bytes"),
    ]:
        with pytest.raises(ConfigError, match=what) as caught:
            config.load(path)
        assert str(path) in str(caught.value)


def test_every_key_says_what_it_is_and_every_number_has_limits() -> None:
    """House rule: a limit on everything, a unit or a meaning for every key."""
    for table in config.TABLES.values():
        for field in msgspec.structs.fields(table):
            meta = field.type.__metadata__[0]
            assert meta.description, field.name
            if field.type.__origin__ in (int, float):
                assert meta.ge is not None or meta.gt is not None, field.name
                assert meta.le is not None or meta.lt is not None, field.name


@settings(max_examples=40, deadline=None)
@given(
    path=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"])),
    registries=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=3
    ),
    deadline_s=st.floats(min_value=1e-3, max_value=3600),
)
def test_what_is_explained_reads_back(path: str, registries: Any, deadline_s: float) -> None:
    """`explain` and `parse` are inverses, whatever the strings hold."""
    some = Config(
        paths=config.Paths(runtime_directory=f"/{path}"),
        source=config.Source(insecure_registries=tuple(registries)),
        fetch=config.Fetch(deadline_s=deadline_s),
    )
    assert config.parse(manual.explain(some), "f.toml") == some


def test_derived_values() -> None:
    """The socket lies in the runtime directory unless it is given; workers are never 0."""
    assert Config().api_socket == "/run/fscached/api.sock"
    assert Config(api=config.Api(socket="/x/y")).api_socket == "/x/y"
    assert Config().fetch_workers >= 1
    assert Config(fetch=config.Fetch(workers=3)).fetch_workers == 3
