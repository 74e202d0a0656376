from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from generative_recommenders.run.plots import plot_curves

HISTORY = [
    {"epoch": 0, "train_loss": 3.0, "ndcg@10": 0.1, "hr@10": 0.2},
    {"epoch": 1, "train_loss": 2.0, "hr@10": None},
    {"epoch": 2, "train_loss": 1.5, "ndcg@10": 0.2, "hr@10": float("nan")},
]


@pytest.fixture
def saved_figures(monkeypatch):
    figures, save = [], Figure.savefig

    def remember(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_draws_the_loss_and_every_metric(tmp_path, saved_figures):
    path = plot_curves(HISTORY, tmp_path / "curves.png")
    loss, metrics = saved_figures[0].axes
    assert list(loss.lines[0].get_ydata()) == [3.0, 2.0, 1.5]
    curves = {line.get_label(): list(line.get_xdata()) for line in metrics.lines}
    assert curves == {"ndcg@10": [0, 2], "hr@10": [0, 2]}
    image = imread(path)
    assert image.shape[0] > 300
    assert image.std() > 0.01


@pytest.mark.parametrize("history", [[], [{"train_loss": 1.0}]])
def test_short_histories(tmp_path, history):
    assert plot_curves(history, tmp_path / "curves.png").stat().st_size > 0


def test_a_failed_write_leaves_the_old_picture_and_no_rest(tmp_path, monkeypatch):
    path = plot_curves(HISTORY[:1], tmp_path / "curves.png")
    before = path.read_bytes()

    def fail(self, name, **kwargs):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(HISTORY, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
