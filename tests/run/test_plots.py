"""Plots of a run's loss and metrics."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from generative_recommenders.errors import UserError
from generative_recommenders.run.report.pictures import plot_curves

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
    assert all(tick == int(tick) for axes in (loss, metrics) for tick in axes.get_xticks())
    image = imread(path)
    assert image.shape[0] > 300
    assert image.std() > 0.01


def test_the_best_epoch_and_the_run_are_named(tmp_path, saved_figures):
    plot_curves(HISTORY, tmp_path / "curves.png", name="runs$1$_of", best=2)
    for axes in saved_figures[0].axes:
        assert list(axes.lines[-1].get_xdata()) == [2, 2]
    assert saved_figures[0].axes[1].lines[-1].get_label() == "best epoch, 2"
    assert saved_figures[0].get_suptitle() == "runs$1$_of"


def test_a_short_history_has_no_empty_axes_and_none_no_picture(tmp_path, saved_figures):
    assert plot_curves([{"train_loss": 1.0}], tmp_path / "curves.png").stat().st_size > 0
    assert [axes.get_title() for axes in saved_figures[0].axes] == ["training loss"]
    assert plot_curves([], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_a_failed_write_leaves_the_old_picture_and_no_rest(tmp_path, monkeypatch):
    path = plot_curves(HISTORY[:1], tmp_path / "curves.png")
    before = path.read_bytes()

    def fail(self, name, **kwargs):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match="disk full"):
        plot_curves(HISTORY, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
