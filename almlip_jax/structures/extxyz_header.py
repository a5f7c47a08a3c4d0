"""The second line of an extended XYZ frame: ``key=value`` pairs, as ASE understands them, and as they were meant.

Beyond ASE: six numbers are a stress in Voigt order, ``Lattice``, ``Properties`` and ``pbc`` are known in any case, a
key that is given two different values is refused, and numbers may have Fortran's exponents (``1.0D+00``).
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

_DELIMITED = {'"': '"', "'": "'", "{": "}", "[": "]"}
_TOKEN = re.compile(
    r"""\s+ | = | "(?:\\.|[^"\\])*(?:"|\\?$) | '(?:\\.|[^'\\])*(?:'|\\?$) | \{(?:\\.|[^}\\])*(?:\}|\\?$)
    | \[(?:\\.|[^\]\\])*(?:\]|\\?$) | \\. | \\$ | [^\s="'{\[\\]+""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(.?)", re.DOTALL)
_WORD = re.compile(r"[^\s,]+")
_FORTRAN = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+)[dD][+-]?\d+")
_FLAGS = {"T": True, "F": False} | dict.fromkeys(("true", "True", "TRUE"), True)
_FLAGS |= dict.fromkeys(("false", "False", "FALSE"), False)
_EMPTY = "\0"
_TENSORS = ("stress", "virial")
_TEXT = ("uid",)
_KNOWN = {"lattice": "Lattice", "properties": "Properties", "pbc": "pbc"}
_PROPERTIES = re.compile(r"\w[\w.+-]*:[A-Za-z]+:\d+(?::|$)")


def parse_header(line: str) -> dict[str, Any]:
    """What a comment line says: key -> number, array, flag, text or what JSON holds; a bare word is a true flag.

    ``Lattice`` is [3, 3] with the cell vectors in rows, ``pbc`` three flags.

    Raises:
        ValueError: a key has two different values, or a cell, its periodicity, a stress or a virial is not what it must
            be.
    """
    texts: dict[str, str] = {}
    for key, text in _pairs(line):
        if not key:
            raise ValueError(f"the value {text!r} has no key")
        name = canonical_key(key, text)
        if texts.setdefault(name, text) != text:
            raise ValueError(f"{name} is given twice, as {texts[name]} and {text}")
    return {name: _VALUES.get(name, _value)(name, text) for name, text in texts.items()}


def canonical_key(key: str, text: str) -> str:
    """The key as the format writes it: ``lattice="3 0 0 ..."`` is ``Lattice``, while ``lattice=fcc`` is a remark."""
    name = _KNOWN.get(key.lower(), key)
    if name == key:
        return key
    words = _WORD.findall(text)
    meant = {
        "Lattice": len(words) == 9 and all(_number(word) is not None for word in words),
        "Properties": _PROPERTIES.match(text) is not None,
        "pbc": len(words) in (1, 3) and all(word in _FLAGS or word in "01" for word in words),
    }
    return name if meant[name] else key


def to_float(text: str) -> float:
    """A number, also one with Fortran's exponent.

    Raises:
        ValueError: it is not a number.
    """
    try:
        return float(text)
    except ValueError:
        if not _FORTRAN.fullmatch(text):
            raise ValueError(f"{text!r} is not a number") from None
        return float(text.lower().replace("d", "e"))


def to_flag(text: str) -> bool:
    """True or false.

    Raises:
        ValueError: it is neither.
    """
    if text in ("0", "1"):
        return text == "1"
    if text not in _FLAGS:
        raise ValueError(f"{text!r} is neither T nor F")
    return _FLAGS[text]


def _pairs(line: str) -> list[tuple[str, str]]:
    """Keys with their texts, quotes and escapes resolved."""
    words: list[list[str]] = [[""]]  # of each word the parts between signs of equality
    for token in _TOKEN.findall(line.strip()):
        word = words[-1]
        if token == "=":
            if word == [""] and len(words) > 1:
                del words[-1]
            words[-1].append("")
        elif token.isspace():
            if word[-1]:
                words.append([""])
        elif token[0] in _DELIMITED:
            inner = token[1:-1] if len(token) > 1 and token[-1] == _DELIMITED[token[0]] else token[1:]
            # an empty text still ends a word
            word[-1] += _ESCAPED.sub(r"\1", inner) or ("" if word[-1] else _EMPTY)
        else:
            word[-1] += _ESCAPED.sub(r"\1", token)
    return [
        (word[0].replace(_EMPTY, ""), "=".join(word[1:]).replace(_EMPTY, "") if len(word) > 1 else "T")
        for word in words
        if len(word) > 1 or word[0].strip(_EMPTY)
    ]


def _value(key: str, text: str) -> Any:
    if key in _TEXT:
        return text
    words = _WORD.findall(text)
    value = _numbers(words) if words else None
    if value is not None:
        return value if len(value) > 1 else value[0]
    if words and all(word in _FLAGS for word in words):
        flags = [_FLAGS[word] for word in words]
        return flags if len(flags) > 1 else flags[0]
    if text.startswith("_JSON "):
        content = json.loads(text.removeprefix("_JSON "))
        array = np.array(content)
        return array if array.dtype.kind in "ifb" else content
    return text


def _numbers(words: list[str]) -> np.ndarray | None:
    for kind in (int, float):
        try:
            return np.array(words, dtype=kind)
        except (ValueError, OverflowError):
            continue
    try:
        return np.array([to_float(word) for word in words])
    except ValueError:
        return None


def _number(word: str) -> float | None:
    try:
        return to_float(word)
    except ValueError:
        return None


def _lattice(key: str, text: str) -> np.ndarray:
    cell = _numbers(_WORD.findall(text))
    if cell is None or cell.shape != (9,):
        raise ValueError(f"{key}={text!r} should be nine numbers, the three cell vectors")
    return cell.astype(np.float64).reshape(3, 3)


def _pbc(key: str, text: str) -> list[bool]:
    words = _WORD.findall(text)
    if len(words) not in (1, 3):
        raise ValueError(f"{key}={text!r} should be three flags such as T T F")
    return [to_flag(word) for word in words] * (3 // len(words))


def _tensor(key: str, text: str) -> np.ndarray:
    """[3, 3] from nine numbers, or the six of ASE's Voigt order."""
    value = _numbers(_WORD.findall(text))
    if value is None or value.shape not in ((6,), (9,)):
        raise ValueError(f"{key} should be 9 numbers, or 6 in Voigt order, and not {text!r}")
    return value if value.shape == (6,) else value.reshape((3, 3), order="F")


_VALUES = {"Lattice": _lattice, "pbc": _pbc} | dict.fromkeys(_TENSORS, _tensor)
