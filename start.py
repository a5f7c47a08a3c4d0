"""The two commands that do everything on a machine with Python and git only.

    python3 start.py run     sets up what is needed and runs the main job, a campaign on the Zundel cation
    python3 start.py test    sets up what is needed and passes the tests

Needs nothing but the standard library.  The packages go into ``.venv`` beside this file, once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
RUN_DIR = ROOT / "runs" / "zundel"
OLDEST = (3, 11)


def suitable_python() -> str:
    """A Python that is new enough: this one, or another on the path."""
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in (13, 12, 11, 14):
        found = shutil.which(f"python3.{minor}")
        works = found and subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
        if found and works:
            return found
    sys.exit("almlip-jax needs Python 3.11 or newer; install one and call it with this file.")


def prepare(extras: str) -> None:
    """Makes the virtual environment and installs the package, unless both are there as they should be."""
    requirements = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + extras.encode()).hexdigest()
    stamp = VENV / f"installed-{extras or 'plain'}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == requirements:
        return
    began = time.monotonic()
    # a stopped call can leave an environment without pip, which making it again completes
    if not PYTHON.exists() or subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode != 0:
        print("making the virtual environment .venv ...", flush=True)
        if subprocess.run([suitable_python(), "-m", "venv", str(VENV)]).returncode != 0:
            sys.exit("the virtual environment could not be made; on Debian and Ubuntu, apt install python3-venv first.")
    print("installing almlip-jax and what it needs (1 to 3 minutes the first time) ...", flush=True)
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--editable", target]
    if subprocess.run(pip).returncode != 0:
        sys.exit("the installation failed; is there a way to the package index? Correct that and call this again.")
    stamp.write_text(requirements)
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)


def run(arguments: list[str]) -> int:
    """The main job; goes on with it where an earlier call was stopped."""
    prepare("")
    command = [str(PYTHON), "-m", "almlip_jax"]
    if (RUN_DIR / "state.json").exists():
        return subprocess.call([*command, "resume", str(RUN_DIR), *arguments])
    return subprocess.call(
        [*command, "run", str(ROOT / "configs" / "zundel.yaml"), "--run-dir", str(RUN_DIR), *arguments]
    )


def test(arguments: list[str], *, slow: bool, slow_part: str | None, browser: bool) -> int:
    """Linter, type checker and tests."""
    parts = [] if slow_part is None else slow_part.split("/")
    if parts and [part.isdecimal() for part in parts] != [True, True]:
        sys.exit(f"--slow-part {slow_part} is not a part of several, such as 2/6.")
    prepare("dev")
    checks: list[list[str]] = [["ruff", "check", "."], ["mypy"]]
    for check in checks:
        print(f"$ {' '.join(check)}", flush=True)
        code = subprocess.call([str(PYTHON), "-m", *check], cwd=ROOT)
        if code:
            return code
    marks = [mark for mark, wanted in (("slow", slow), ("browser", browser)) if wanted]
    for mark in marks:
        code = subprocess.call([str(PYTHON), "-m", "pytest", "-q", "-m", mark, *arguments], cwd=ROOT)
        if code:
            return code
    side_by_side = [str(PYTHON), "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *arguments]
    code = 0 if slow else subprocess.call(side_by_side, cwd=ROOT)
    if code or not parts:
        return code
    part = ["-m", "slow", "--group", parts[0], "--splits", parts[1], "--splitting-algorithm", "least_duration"]
    part += ["--durations-path", str(ROOT / "tests" / "slow_seconds.json")]
    return subprocess.call([*side_by_side, *part], cwd=ROOT)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "test"))
    parser.add_argument("--slow", action="store_true", help="test: only the tests that take minutes")
    parser.add_argument("--slow-part", metavar="K/N", help="test: then also the K-th of N equally long parts of those")
    parser.add_argument("--browser", action="store_true", help="test: also those that need Chromium")
    options, arguments = parser.parse_known_args()
    if options.what == "run":
        return run(arguments)
    return test(arguments, slow=options.slow, slow_part=options.slow_part, browser=options.browser)


if __name__ == "__main__":
    sys.exit(main())
