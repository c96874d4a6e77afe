import pytest
from backends import BACKEND

from keras_frn import cli, demo

pytest.importorskip("sklearn", reason="of the [demo] extra")
pytest.importorskip("matplotlib", reason="of the [demo] extra")


@pytest.mark.once
def test_short_demo_writes_every_file(tmp_path, capsys):
    rows = demo.run(tmp_path / "new" / "folder", epochs=3)
    expected = {"trained model", ".keras, reloaded"}
    if BACKEND == "tensorflow":
        expected |= {"SavedModel", "LiteRT"}
    assert {row.format for row in rows} == expected
    for row in rows:
        assert row.accuracy > 0.6  # three epochs of twenty-four: about 80%; by chance 10%
        assert row.largest_difference < 1e-4  # of logits of about 10
        assert row.kilobytes > 0
    assert rows[1].largest_difference < 1e-5
    folder = tmp_path / "new" / "folder"
    assert (folder / "training.png").stat().st_size > 10_000
    assert rows[0].kilobytes == pytest.approx((folder / "digits.keras").stat().st_size / 1e3)
    printed = capsys.readouterr().out
    assert all(name in printed for name in expected)


def test_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match=r"`output` must be a new or empty folder. Received"):
        demo.run(tmp_path / "mine.txt")


def test_held_out_digits_are_not_trained_on():
    x, y, x_test, y_test = demo.digits()
    assert (len(x), len(x_test)) == (1437, 360)
    assert x.shape[1:] == x_test.shape[1:] == (8, 8, 1)
    assert 0 <= x.min() < x.max() == 1
    assert set(y) == set(y_test) == set(range(10))
    assert not {a.tobytes() for a in x} & {a.tobytes() for a in x_test}
