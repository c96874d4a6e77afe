"""Runs the code in Markdown files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


def run_code(path, names):
    """Runs each Python block of a file in one namespace, and returns how many there are."""
    blocks = _blocks(path)
    for block in blocks:
        exec(compile(block, path, "exec"), names)
    return len(blocks)


def programs(path):
    """The Python blocks of a file whose blocks are whole programs, each with its backend, which it
    names itself."""
    for block in _blocks(path):
        yield re.search(r'"KERAS_BACKEND"\] = "(\w+)"', block)[1], block
