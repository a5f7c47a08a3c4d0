"""The text of LAMMPS's input scripts: where the potential comes in, and what is read in place of what is written.

LAMMPS reads a script to its end on its own, and `quit` would end this process with it.  A script is therefore cut where
the potential comes in and where it includes files, and each `quit` becomes a jump to the end, in those files too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from almlip_jax.errors import InputError

_FIX = re.compile(r"^\s*fix\s+(\S+)\s+(\S+)\s+external\s+pf/callback\b")
_QUIT = re.compile(r"^\s*quit(\s+0)?\s*$")
_LABEL, _JUMP = re.compile(r"^\s*label\s+(\S+)"), re.compile(r"\bjump\s+SELF\s+([^\s\"']+)")
_JUMP_TO_FILE = re.compile(r"\b(jump\s+)([^\s\"']+)")
_COMMAND_QUIT = re.compile(r"\s*quit(?:\s+([^\s\"'#]+))?\s*(?:#.*)?")
_INCLUDE = re.compile(r"\s*include\s+([\"']?)([^\s\"'#$]+)\1\s*(?:#.*)?")
_ANY_INCLUDE = re.compile(r"\s*include\s+([\"']?)([^\s\"'#]+)\1\s*(?:#.*)?")
_WAYS = re.compile(r"\b(label|jump)\b")
_WORDS = re.compile(r'"""[\s\S]*?"""|"[^"]*"|\'[^\']*\'|[^\s"\']+')
_COMPUTE = re.compile(r"^\s*compute\s+(\S+)\s+\S+\s+((?:pe/atom|stress/atom)\b.*)$", re.MULTILINE)
HANDED = {"pe/atom": "energies", "stress/atom": "stresses"}
"""Computes of parts of atoms, and the results of a potential that are handed to them where they are asked for."""
END, STATUS, FILE = "almlip_end_of_script", "almlip_has_quit", "almlip_included"
"""A label at the end of what LAMMPS reads, and variables: that the script has quit, and how; and a file's name."""
_LINE = "fix almlip all external pf/callback 1 1"
DEEPEST = 16
"""Files within files, as in LAMMPS."""


def pieces_of(script: Path) -> list[tuple[str, tuple[str, str] | None]]:
    """The text of a script up to each line that asks for the potential, with fix ID and group; the rest with None.

    The rest ends at a line ``quit`` that no later label can skip: LAMMPS would end this process there.

    Raises:
        InputError: it cannot be read, has no such line, or one that cannot be understood.
    """
    lines = list(_lines_of(script, script))
    pieces: list[tuple[str, tuple[str, str] | None]] = []
    piece: list[str] = []
    command = ""
    for number, (line, where) in enumerate(lines, 1):
        piece.append(line)
        command += line.split("#")[0].rstrip()
        if command.endswith("&"):
            command = command[:-1]
            continue
        if _QUIT.match(command) and not any(_LABEL.match(later) for later, _ in lines[number:]):
            piece.pop()
            break
        found = _asked_for(command, where)
        if found is not None:
            pieces.append(("\n".join(piece), found))
            piece = []
        command = ""
    if not pieces:
        raise InputError(
            f"{script} has no line '{_LINE}' that says where the potential comes in; add it (of files that it includes "
            "only those that are named without variables, and not within an 'if', are looked at)."
        )
    pieces.append(("\n".join(piece), None))
    _check_jumps([text for text, _ in pieces], script)
    return pieces


def _lines_of(path: Path, script: Path, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Lines of a script with the place of each; a file that asks for the potential, in place of its ``include``.

    A jump to the script by its name is one to what is read in its place.

    Raises:
        InputError: the script cannot be read, or a file that asks for the potential has labels or jumps of its own.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give an input script of LAMMPS.") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        found = _INCLUDE.fullmatch(line)
        if found is not None and depth < DEEPEST and _asks(inner := Path(found[2]), depth + 1):
            for text, place in _lines_of(inner, script, depth + 1):
                if re.match(r"\s*(label|jump)\s", text):
                    raise InputError(
                        f"{place}: a file that is included and asks for the potential has no labels and jumps of its "
                        f"own; put its line 'fix ... external' into {script}."
                    )
                yield text, place
        else:
            yield _JUMP_TO_FILE.sub(lambda jump: _to_itself(jump, script), line), where


def _asks(path: Path, depth: int) -> bool:
    """Whether a file that a script includes asks for the potential, or includes one that does."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return False  # which LAMMPS says, or which the script makes
    inner = [found[2] for line in lines if (found := _INCLUDE.fullmatch(line))]
    return any(map(_FIX.match, lines)) or (depth < DEEPEST and any(_asks(Path(name), depth + 1) for name in inner))


def _to_itself(jump: re.Match[str], script: Path) -> str:
    """A jump to the file of the script as one to ``SELF``."""
    own = Path(jump[2]).name == script.name and Path(jump[2]).resolve() == script.resolve()
    return f"{jump[1]}SELF" if own else jump[0]


def _asked_for(command: str, where: str) -> tuple[str, str] | None:
    """Fix ID and group of a command that asks for the potential."""
    if _FIX.match(command) is None:
        return None
    words = command.split()
    if "$" in words[1] + words[2]:
        raise InputError(f"{where}: write the ID and the group of the fix as they are, without variables.")
    if words[5:] != ["1", "1"]:
        raise InputError(f"{where}: forces are needed at every step; write '{' '.join(words[:5])} 1 1'.")
    return words[1], words[2]


def _check_jumps(texts: Sequence[str], script: Path) -> None:
    """Refuses loops over lines that ask for the potential."""
    earlier: set[str] = set()
    for text in texts:
        lines = text.splitlines()
        own = {found[1] for line in lines if (found := _LABEL.match(line))}
        back = {found[1] for line in lines if (found := _JUMP.search(line))} & (earlier - own)
        if back:
            raise InputError(
                f"{script} jumps back to the label '{min(back)}' over a line 'fix ... external'; put that line before "
                "the loop."
            )
        earlier |= own


@dataclass
class Copies:
    """Copies of the files that a script includes, where one of them quits; paths are meant from the working directory.

    Attributes:
        folder: that they are written into.
        script: its text.  A file that it names elsewhere than in an ``include`` may be made as it runs, and stays.
    """

    folder: Path
    script: str = ""
    _above: list[str] = field(default_factory=list)

    def of(self, name: str) -> Path | None:
        """The copy of a file; None where the file itself will do, or has to."""
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        others = re.sub(r"#.*|\binclude\s+[^\s]+", "", self.script)
        if name in self._above or len(self._above) == DEEPEST or Path(name).name in others:
            return None
        self._above.append(name)
        without = without_quit(text, self)
        self._above.pop()
        if without == text.removesuffix("\n"):
            return None
        copy = self.folder / f"{len(list(self.folder.iterdir()))}_{Path(name).name}"
        copy.write_text(f"{without}\nlabel {END}\n")
        return copy


def computes_of_atoms(text: str) -> Iterator[tuple[str, str, bool]]:
    """ID and style of each compute of `HANDED` in some commands, and whether it holds what fixes give."""
    for name, told in _COMPUTE.findall(text):
        style, *words = told.split("#")[0].split()
        parts = words if style == "pe/atom" else words[1:]
        yield name, style, not parts or bool({"fix", "virial"} & {*parts})


def with_included(texts: Sequence[str], depth: int = 0) -> Iterator[str]:
    """Texts of a script, and those of the files that it includes, as far as they are there."""
    for text in texts:
        yield text
        for name in re.findall(r"\binclude\s+([^\s\"'#$]+)", re.sub("#.*", "", text)) if depth < DEEPEST else []:
            try:
                inner = Path(name).read_text()
            except (OSError, UnicodeDecodeError):
                continue
            yield from with_included([inner], depth + 1)


def parts_of(text: str) -> Iterator[tuple[str, str | None]]:
    """Parts of a text, each with the name of the file that is included after it, as it is written; the rest with None.

    Names with variables are known only when LAMMPS is there, and files that a script makes are there only then.  A text
    with labels or jumps is one part, since parts of it are read again or passed over; so is one with longer quotations.
    """
    lines, part, goes_on = text.splitlines(), [], False
    if _WAYS.search(re.sub("#.*", "", text)) or '"""' in text:
        lines, part = [], lines
    for line in lines:
        found = None if goes_on else _ANY_INCLUDE.fullmatch(line)
        goes_on = line.split("#")[0].rstrip().endswith("&")
        if found is None:
            part.append(line)
        else:
            yield "\n".join(part), found[2]
            part = []
    yield "\n".join(part), None


def without_quit(text: str, copies: Copies | None = None) -> str:
    """Text with a jump to its end in place of each command ``quit``, also within ``if``: it would end this process.

    Args:
        text: of a script, or a part of it.
        copies: of the files that it includes; these are left as they are where not given.
    """
    lines: list[str] = []
    command: list[str] = []
    for line in text.splitlines():
        command.append(line)
        if line.split("#")[0].rstrip().endswith("&"):
            continue
        whole, command = "\n".join(command), []
        if found := _COMMAND_QUIT.fullmatch(whole):
            lines += _instead(found[1])
        elif (copy := _copied(whole, copies)) is not None:
            lines += [f"include {copy}", _on_to_the_end()]
        elif re.match(r"\s*if\s", whole):
            changed = _WORDS.sub(lambda word: _word_without_quit(word, copies=copies), whole)
            includes = copies is not None and f"include {copies.folder}" in changed
            lines += [changed, *([_on_to_the_end()] if includes else [])]
        else:
            lines.append(whole)
    return "\n".join(lines + command)


def _word_without_quit(
    word: re.Match[str], quote: str = '"', copies: Copies | None = None, *, within: bool = False
) -> str:
    """A word of an ``if``: what it stands for, where that is to quit, to include what quits, or is another ``if``."""
    text = word[0]
    own = next((one for one in ('"""', '"', "'") if text.startswith(one)), "")
    content = text.removeprefix(own).removesuffix(own)
    own_or_other = own or quote
    if found := _COMMAND_QUIT.fullmatch(content):
        return " ".join(f"{own_or_other}{one}{own_or_other}" for one in _instead(found[1]))
    other = "'" if own_or_other == '"' else '"'
    if (copy := _copied(content, copies)) is not None:
        words = [f"include {copy}", *([] if within else [_on_to_the_end(other)])]  # there are two kinds of quotes only
        return " ".join(f"{own_or_other}{one}{own_or_other}" for one in words)
    if own and re.match(r"\s*if\s", content):
        return own + _WORDS.sub(lambda one: _word_without_quit(one, other, copies, within=True), content) + own
    return text


def _copied(command: str, copies: Copies | None) -> Path | None:
    """The copy that is read in place of a file that a command includes, where there is one."""
    found = _INCLUDE.fullmatch(command)
    return None if found is None or copies is None else copies.of(found[2])


def _on_to_the_end(quote: str = '"') -> str:
    """A command that goes on to the end where a file that was included has quit."""
    return f"if {quote}$(is_defined(variable,{STATUS})){quote} then {quote}jump SELF {END}{quote}"


def _instead(status: str | None) -> list[str]:
    """Commands in place of one that quits."""
    return [f"variable {STATUS} string {status or 0}", f"jump SELF {END}"]
