"""Runs the code in Markdown files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_code(path, names):
    """Runs each Python block of a file in one namespace, and returns how many there are."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE
    )
    for block in blocks:
        exec(compile(block, path, "exec"), names)
    return len(blocks)
