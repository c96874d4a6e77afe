"""The studies of training at toy size. They run on JAX, whatever the backend of the tests."""

import csv
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import BACKEND

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="the studies run on JAX, once is enough")


@pytest.fixture
def fashion(tmp_path, rng):
    """A folder with as few images as the study needs, in the format of the real ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, count in (("train", 32), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 28, 28), "uint8")
        for kind, rank, values in (("images", 3, images), ("labels", 1, np.arange(count) % 10)):
            with gzip.open(folder / f"{part}-{kind}-idx{rank}-ubyte.gz", "wb") as file:
                file.write(bytes(4 + 4 * rank) + values.astype("uint8").tobytes())
    return folder


def run(script, *arguments):
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, FOLDER / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        # A program that runs a few steps need not be fast.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_small_batch_study_writes_its_results(fashion, tmp_path):
    names = ("--batches", 2, "--only", "BatchNormalization + ReLU")
    common = ("--data", fashion, "--results", tmp_path, "--images", 8)
    out = run("small_batch.py", *common, *names, "--seeds", 2, "--tune")
    table = tmp_path / "small_batch.csv"
    found = rows(table)
    assert len(found) == 2 * 2
    assert {r["rate"] for r in found} <= {"0.03", "0.1", "0.3", "1.0"}
    assert {r["statistics"] for r in found} <= {"running", "recomputed"}
    assert "Test accuracy in %" in out
    assert (tmp_path / "small_batch.png").stat().st_size > 5000

    # A kill in the middle of a line: that run is done again, and the others are not.
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert "[1/1]" in run("small_batch.py", *common, *names, "--seeds", 2)
    assert table.read_text().startswith("".join(lines[:-1]))
    assert rows(table)[-1]["accuracy"] == found[-1]["accuracy"], "a seed gives the same run"

    out = run("small_batch.py", *common, *names, "--seeds", 3, "--budget-minutes", 1e-9)
    assert "The budget is used up; 2 runs are left." in out
    change = "epsilon = nu2 at the start"
    rates = tmp_path / "small_batch_rates.csv"
    rates.write_text(rates.read_text().replace("BatchNormalization + ReLU", "FRN + TLU"))
    run("small_batch.py", *common, "--seeds", 1, "--ablate", "--only", change)
    assert rows(table)[-1]["variant"] == change


def test_report_names_the_winner(capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    report = __import__("report")
    ours, close, better = {0: 80.0, 1: 81.0, 2: 82.0}, {0: 79.0, 1: 82.0, 2: 82.5}, {}
    better = {seed: value + 1 + 0.1 * seed for seed, value in ours.items()}
    assert report.verdict(ours, close, "x").startswith("shows no difference from x (-0.2 ± ")
    # The differences are -1, -1.1 and -1.2: mean 1.1, half interval 4.303 * 0.1 / sqrt(3) = 0.25.
    assert report.verdict(ours, better, "x") == "LOSES to x by 1.1 ± 0.2"
    assert report.verdict(better, ours, "x") == "ahead of x by 1.1 ± 0.2"


@pytest.mark.slow
def test_segmentation_study_writes_its_results(tmp_path):
    out = run(
        *("segmentation.py", "--results", tmp_path, "--steps", 3, "--seeds", 1, "--size", 8),
        *("--tune", "--only", "FRN + TLU"),
    )
    found = rows(tmp_path / "segmentation.csv")
    assert len(found) == 2
    assert all(0 <= float(r["dice"]) <= 100 for r in found)
    assert "Dice in %" in out
    assert (tmp_path / "segmentation.png").stat().st_size > 3000
