"""Runs the code in Markdown files.

Python blocks run in one namespace. Lines of `sh` blocks that begin with `keras-frn` run in this
process. A block after the line `<!-- only: tensorflow -->` runs on this backend only."""

import re
import shlex
from pathlib import Path

import keras

from keras_frn import cli

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"^(?:<!-- only: (\w+) -->\n)?```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


def run_code(path, names):
    """Runs the blocks of a file, and returns how many Python blocks have run."""
    count = 0
    for backend, language, code in _BLOCK.findall((ROOT / path).read_text()):
        if backend not in ("", keras.backend.backend()):
            continue
        if language == "python":
            exec(compile(code, path, "exec"), names)
            count += 1
            continue
        for line in code.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            # The demo has a test of its own.
            if program == "keras-frn" and arguments[0] != "demo":
                assert cli.main(arguments) == 0, line
    return count


def programs(path):
    """The Python blocks of a file whose blocks are whole programs, each with its backend, which it
    names itself."""
    for _, language, block in _BLOCK.findall((ROOT / path).read_text()):
        if language == "python":
            yield re.search(r'"KERAS_BACKEND"\] = "(\w+)"', block)[1], block
