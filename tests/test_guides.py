"""The pages whose code blocks are whole programs, each run in a process of its own."""

import os
import subprocess
import sys

import pytest
from backends import BACKEND
from markdown import ROOT, programs

PROGRAMS = [
    pytest.param(block, id=f"{page} {number}")
    for page in ("devices", "per-example-gradients")
    for number, (backend, block) in enumerate(programs(f"docs/{page}.md"), 1)
    if backend == BACKEND
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_programs_in_guides(block, tmp_path):
    (tmp_path / "program.py").write_text(block)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0
    assert result.stdout, "each program prints what it found"
