"""Exported files under load, from many threads; `benchmarks/serving.py` has 100,000 calls."""

from pathlib import Path

import pytest
from backends import BACKEND


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exported from TensorFlow here")
def test_many_threads_get_the_right_answers(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import serving

    for name, (difference, *_) in serving.main(calls=400, threads=8).items():
        # Logits of about 1. The order of sums may depend on what a thread is given.
        assert difference < 1e-6, name
