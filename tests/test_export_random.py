"""The first models of `benchmarks/export_fuzz.py`, which is the study."""

from pathlib import Path

import keras
import pytest
from exporting import slow_cases

pytest.importorskip("ai_edge_quantizer", reason="of the [export] extra")
pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="LiteRT from TensorFlow"),
    # Single positions occur here with every kind of epsilon.
    pytest.mark.filterwarnings("ignore:Layer .* normalizes single positions"),
]


@pytest.mark.parametrize("seed", [0, 1, *slow_cases(*range(2, 6))])
def test_random_models_have_no_silent_errors(seed, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import export_fuzz

    preset = ("int8", None)[seed % 2]
    row = export_fuzz.study(seed, [preset])
    name = preset or "float32"
    assert not row.get(f"{name} silent"), row
    steps = row.get("micro steps", 0)
    # Two runtimes round on their own, and the network amplifies it: 2 steps were seen.
    assert isinstance(steps, str) or steps <= 6, row
