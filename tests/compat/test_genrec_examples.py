"""The usage examples of genrec's modules, with the import line changed and undefined names filled in."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from generative_recommenders.compat.genrec.modules import (
    AttentionVisualization,
    ModelUtils,
    MultiHeadAttention,
    RecommendationMetrics,
    SequenceLoss,
    TransformerEncoder,
    VQVAELoss,
)
from generative_recommenders.errors import UserError

mpl.use("Agg")


def test_using_encoders() -> None:
    encoder = TransformerEncoder(vocab_size=1000, embedding_dim=512, num_heads=8, num_layers=6, attn_dim=2048).eval()
    input_ids = torch.randint(0, 1000, (2, 50))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 30:] = 0
    with torch.no_grad():
        encoded = encoder(input_ids, attention_mask)
        input_ids[1, 30:] = 0
        other_padding = encoder(input_ids, attention_mask)
    assert encoded.shape == (2, 50, 512)
    assert torch.allclose(encoded[1, :30], other_padding[1, :30], atol=1e-5)


def test_using_loss_functions() -> None:
    x, x_recon = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    commitment_loss, embedding_loss = torch.tensor(0.5), torch.tensor(0.25)
    vqvae_loss = VQVAELoss(commitment_cost=0.25)
    losses = vqvae_loss(x, x_recon, commitment_loss, embedding_loss)
    assert set(losses) == {"total_loss", "reconstruction_loss", "commitment_loss", "embedding_loss"}
    total = (x - x_recon).square().mean() + 0.25 * 0.5 + 0.25
    assert torch.allclose(losses["total_loss"], total)

    logits, labels = torch.randn(3, 5, 1000, requires_grad=True), torch.randint(0, 1000, (3, 5))
    labels[0, 3:] = -100
    attention_mask = (labels != -100).long()
    seq_loss = SequenceLoss(vocab_size=1000, label_smoothing=0.1)
    losses = seq_loss(logits, labels, attention_mask)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert torch.allclose(losses["loss"], expected, rtol=1e-5)
    correct = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    assert torch.allclose(losses["accuracy"], correct)


def test_computing_evaluation_metrics() -> None:
    predictions = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    targets = [[1, 3, 5], [7, 9]]
    assert RecommendationMetrics.recall_at_k(predictions, targets, 5) == pytest.approx(1.0)
    assert RecommendationMetrics.hit_rate_at_k(predictions, targets, 5) == pytest.approx(1.0)
    gains = 1 / np.log2(np.arange(2, 7))
    ndcg = np.mean([gains[[0, 2, 4]].sum() / gains[:3].sum(), gains[[1, 3]].sum() / gains[:2].sum()])
    assert RecommendationMetrics.ndcg_at_k(predictions, targets, 5) == pytest.approx(ndcg)


def _model() -> TransformerEncoder:
    return TransformerEncoder(vocab_size=20, embedding_dim=8, num_heads=2, num_layers=1, attn_dim=16)


def test_no_places_have_no_gain() -> None:
    assert RecommendationMetrics.ndcg_at_k([[1, 2], [3]], [[1], [3]], 0) == 0.0
    assert RecommendationMetrics.ndcg_at_k([[1, 2], [3]], [[1], [3]], -1) == 0.0


def test_model_tools() -> None:
    model = _model()
    param_count = ModelUtils.count_parameters(model)
    assert param_count == sum(p.numel() for p in model.parameters())
    assert ModelUtils.get_model_size(nn.Linear(1024, 512)) == "2.00 MB"
    ModelUtils.freeze_layers(model, ["embedding", "pos_encoding"])
    assert ModelUtils.count_parameters(model) == param_count - 20 * 8
    ModelUtils.freeze_layers(model, ["transformer"])
    assert ModelUtils.count_parameters(model) == 0
    ModelUtils.unfreeze_layers(model, ["transformer"])
    assert ModelUtils.count_parameters(model) == param_count - 20 * 8
    ModelUtils.initialize_weights(model, init_type="xavier")


@pytest.mark.parametrize("init_type", ["xavier", "kaiming", "normal"])
def test_initialization_draws_matrices_and_clears_biases(init_type: str) -> None:
    model = nn.Sequential(nn.Embedding(50, 30, padding_idx=0), nn.Linear(30, 40), nn.LayerNorm(40))
    model.register_parameter("table", nn.Parameter(torch.empty(4, 4)))  # a matrix that is not named "weight"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    ModelUtils.initialize_weights(model, init_type)
    assert (model[1].bias == 0).all() and (model[2].bias == 0).all()
    assert (model[2].weight == 7.0).all() and (model.table == 7.0).all()
    assert (model[0].weight[0] == 0).all()
    expected = {"xavier": (2 / 70) ** 0.5, "kaiming": (2 / 30) ** 0.5, "normal": 0.02}[init_type]
    assert model[1].weight.std().item() == pytest.approx(expected, rel=0.15)
    assert model[1].weight.abs().max() < 1.0


def test_unknown_names_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="xavier, kaiming, normal"):
        ModelUtils.initialize_weights(_model(), "zero")
    ModelUtils.freeze_layers(_model(), ["decoder"])
    assert "'decoder'" in caplog.text


@pytest.mark.parametrize(("width", "numbers"), [(3, 18), (40, 0)])
def test_attention_heatmap_has_the_documented_titles_and_numbers_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, width: int, numbers: int
) -> None:
    import matplotlib.pyplot as plt

    figures, tokens = [], [str(i) for i in range(width)]
    monkeypatch.setattr(plt, "close", figures.append)
    weights = torch.rand(2 * width, width, dtype=torch.bfloat16, requires_grad=True)
    AttentionVisualization.plot_attention_heatmap(weights, tokens, tokens + tokens)
    axes = figures[0].axes[0]
    titles = axes.get_title(), axes.get_xlabel(), axes.get_ylabel()
    monkeypatch.undo()
    plt.close(figures[0])
    assert titles == ("Attention Weights", "Input Tokens", "Output Tokens")
    assert len(axes.texts) == numbers


def test_attention_heatmap_is_written(tmp_path: Path) -> None:
    path, weights = tmp_path / "heatmap.png", torch.rand(2, 1)
    AttentionVisualization.plot_attention_heatmap(weights, ["a"], ["b", "c"], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="the tokens need"):
        AttentionVisualization.plot_attention_heatmap(weights, ["a"], ["b"])


def test_attention_heatmap_leaves_no_figure_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown, before = [], plt.get_fignums()
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    AttentionVisualization.plot_attention_heatmap(torch.ones(1, 1), ["a"], ["b"])
    assert shown == []
    monkeypatch.setattr(plt, "isinteractive", lambda: True)
    AttentionVisualization.plot_attention_heatmap(torch.ones(1, 1), ["a"], ["b"])
    assert shown == [True]
    with pytest.raises(FileNotFoundError):
        AttentionVisualization.plot_attention_heatmap(torch.ones(1, 1), ["a"], ["b"], tmp_path / "none" / "a.png")
    assert plt.get_fignums() == before


def test_attention_has_the_documented_attributes() -> None:
    attention = MultiHeadAttention(12, 3, dropout=0.5)
    assert (attention.embedding_dim, attention.num_heads, attention.head_dim) == (12, 3, 4)
    assert attention.scale == 2.0 and attention.dropout.p == 0.5
    x = torch.randn(2, 5, 12)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.dropout.p = 0.0
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.dropout.p = 0.5
    assert torch.equal(attention.eval()(x, x, x)[0], attention(x, x, x)[0])
