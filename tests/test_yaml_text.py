"""YAML: what plain words mean, what is taken over, and a sentence for everything that is no config."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from almlip_jax.campaign.config import load_config
from almlip_jax.errors import InputError
from almlip_jax.yaml_text import parse_yaml, read_yaml, yaml_text

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGED_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)
)
LADDER = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 1e-3),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x1F", 31),
        ("-.inf", -math.inf),
        ("true", True),
        ("~", None),
        ("on", "on"),
        ("no", "no"),
        ("01:00:00", "01:00:00"),
        ("2026-13-45", "2026-13-45"),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_plain_words(word, value):
    found = parse_yaml(f"key: {word}", "text").value["key"]
    assert found == value and type(found) is type(value)
    assert parse_yaml(yaml_text({"key": value}), "text").value == {"key": value}


def test_keys_are_names_and_merge_keys_take_over():
    text = "on: [stop]\n1: &first {a: 1, b: [2]}\nx: {<<: *first, a: 3}\ny: {<<: [{c: 4}, *first], c: 5}\n"
    value = parse_yaml(text, "text").value
    assert value == {"on": ["stop"], "1": {"a": 1, "b": [2]}, "x": {"b": [2], "a": 3}, "y": {"a": 1, "b": [2], "c": 5}}
    assert value["x"]["b"] is not value["1"]["b"]  # a change of one is none of the other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\x00\xfe", "is not text"),
        ("name: caf\xe9\nseed: 1\n".encode("latin-1"), r"is not in UTF-8 \(line 1\); save it as UTF-8"),
        (b"name: \x01\n", "character #x0001"),
        (b'name: "a\\0b"\n', "character #x0000"),
        (b"a: 1\n" * 300_000, "more than 1 MiB"),
        (b"? [1, 2]\n: 3\n", "line 1, a key should be a name"),
        (b"? {a: 1}\n: 3\n", "line 1, a key should be a name"),
        (b"a: &a [*a]\n", "line 1, an alias stands for something that contains it"),
        (b"a: &a {<<: *a}\n", "line 1, an alias stands for something"),
        (BOMB.encode(), "more than 100,000 values"),
        (MERGED_BOMB.encode(), "more than 100,000 values"),
        (LADDER.encode(), "more than 50 levels deep"),
        (b"[" * 300, "more than 50 levels deep"),
        (b"a: {<<: 3}\n", "line 1, '<<' takes over keys and values"),
        (b"a: 1\na: 2\n", "line 2, key 'a' is given twice"),
        (b"a: !!python/object/apply:os.system [ls]\n", "the tag !!python/object/apply:os.system cannot be used"),
        (b"a: !!timestamp 2026-13-45\n", "the tag !!timestamp cannot be used"),
        (b"a: !!int many\n", "'many' is not of type int"),
        (b"a: " + b"9" * 5000 + b"\n", "is not of type int"),
        (b"a: 1\n---\nb: 2\n", "line 2, .*another document"),
        (b"a: b: c\n", "line 1, mapping values are not allowed here"),
        (b"a: *b\n", "line 1, found undefined alias"),
        (b"- a\n", "is not a config; it must hold keys and values"),
    ],
)
def test_what_is_no_config_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and time.process_time() - began < 10


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(tmp_path, coding):
    path = tmp_path / "config.yaml"
    path.write_bytes("name: caf\xe9\n".encode(coding))
    assert read_yaml(path).value == {"name": "caf\xe9"}


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_config_lacks_what_it_must_have(tmp_path, content):
    """A training needs nothing; a campaign does."""
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"oracle: the key is missing"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(("path", "message"), [("/dev/null", "key is missing"), (".", "cannot be read .*directory")])
def test_what_is_no_file(path, message):
    with pytest.raises(InputError, match=message):
        load_config(Path(path))


def test_text_reads_back_as_it_was():
    words = ["1e-3", "on", "01:00:00", "2026-11-25", "010", "0o7", "1_0", ".5", "~", "null", "true", "<<", "", "=", "é"]
    value = {"words": words, "numbers": [1e-5, 1e22, 0.1, -math.inf, 3], "1": {"on": None}}
    assert parse_yaml(yaml_text(value), "text").value == value
    assert parse_yaml(yaml_text(value, flow=True), "text").value == value
