"""What every encoder does by itself, on the tokens of a layout: dropout, precision, recomputation, masks, times."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.build.factories import get_sequential_encoder
from generative_recommenders.config.registry import ENCODERS
from generative_recommenders.errors import UserError
from generative_recommenders.modeling.encoders.base import TimedEncoder
from generative_recommenders.modeling.encoders.sasrec import SASRec, SasrecBlock
from generative_recommenders.modeling.input_preprocessors import LearnablePositionalEmbeddingInputFeaturesPreprocessor
from generative_recommenders.modeling.model import SequenceEncoder
from generative_recommenders.ops.layout import AttentionMask, Layout, jagged_layout, padded_layout
from tiny_models import contracted

WIDTH, COLUMNS = 8, 6
LENGTHS = torch.tensor([5, 0, 1, 3])
SOFTMAX = {"normalization": "softmax_rel_bias"}
FORMS: dict[str, tuple[str, dict]] = {
    **{name: (name, {"num_heads": 2}) for name in contracted(ENCODERS) if name not in ("TwoTower", "GRU4Rec")},
    "HSTU-softmax": ("HSTU", {"num_heads": 2, **SOFTMAX}),
}
DROPOUT_RATES = [
    ("SASRec", "ffn_dropout_rate"), ("Transformer", "dropout_rate"), ("DiffTransformer", "dropout_rate"),
    ("LiGR", "dropout_rate"), ("HSTU", "attn_dropout_rate"), ("HSTU", "linear_dropout_rate"),
    ("HSTU-softmax", "attn_dropout_rate"), ("HSTU-softmax", "linear_dropout_rate"), ("FuXi", "attn_dropout_rate"),
    ("FuXi", "linear_dropout_rate"),
]  # fmt: skip
NO_DROPOUT = {"SASRec": "ffn_dropout_rate", "Transformer": "dropout_rate", "LiGR": "dropout_rate"}
of_every_form = pytest.mark.parametrize("form", FORMS)


def encoder_of(form: str, **options: object) -> torch.nn.Module:
    """With dropout only where an option asks for it, and a bias by time that is not 0."""
    name, own = FORMS[form]
    without = {NO_DROPOUT[name]: 0.0} if name in NO_DROPOUT else {}
    torch.manual_seed(0)
    encoder = get_sequential_encoder(name, WIDTH, COLUMNS, **{**without, **own, **options})
    with torch.no_grad():
        for parameter in (each for key, each in encoder.named_parameters() if key.endswith(".time")):
            parameter.normal_()
    return encoder


def tokens() -> tuple[torch.Tensor, Layout, dict[str, torch.Tensor]]:
    generator, count = torch.Generator().manual_seed(1), int(LENGTHS.sum())
    times = torch.randint(1, 10**6, (count,), generator=generator)
    events = {"timestamps": times, "next_timestamps": times + 500}
    return torch.randn(count, WIDTH, generator=generator), jagged_layout(LENGTHS, COLUMNS), events


class Own(TimedEncoder):
    """As plug-ins write it: a constructor that sets what the base reads."""

    def __init__(self) -> None:
        super().__init__()
        self.output_dim = WIDTH
        self.activation_checkpoint = False
        self.max_length, self.timed, self.next_time = COLUMNS, True, "hidden"
        self.blocks = torch.nn.ModuleList([SasrecBlock(WIDTH, 2, WIDTH)])


def test_an_encoder_on_the_bases_needs_no_arguments() -> None:
    x, layout, events = tokens()
    encoder = Own().eval()
    assert torch.equal(encoder(x, layout, events), encoder.blocks[0](x, layout))
    assert encoder.times(events) == (events["timestamps"], events["timestamps"])


class Doubled(SASRec):
    def forward(self, *inputs):
        return 2.0 * super().forward(*inputs)


class DoubledBlock(SasrecBlock):
    def forward(self, *inputs):
        return 2.0 * super().forward(*inputs)


class DoubledBlockOverCache(DoubledBlock):
    def keys_values(self, x):
        return super().keys_values(x)

    def over_cache(self, *inputs):
        return 2.0 * super().over_cache(*inputs)


@pytest.mark.parametrize("block", [None, DoubledBlock, DoubledBlockOverCache])
@torch.no_grad()
def test_a_forward_of_a_derived_class_decides_the_state_after_the_last_event(block: type[SasrecBlock] | None) -> None:
    """What it inherits for queries and sessions is of another forward, and is taken where it says it anew."""
    torch.manual_seed(0)
    encoder = SASRec(WIDTH, num_heads=2) if block else Doubled(WIDTH, num_heads=2)
    if block is not None:
        encoder.blocks = torch.nn.ModuleList([block(WIDTH, 2, WIDTH) for _ in range(2)])
    x, layout, events = tokens()
    positions = LearnablePositionalEmbeddingInputFeaturesPreprocessor(COLUMNS, WIDTH)
    sequence = SequenceEncoder(positions, encoder, torch.nn.Identity()).eval()
    expected = layout.at_end(sequence(x, layout, events))
    torch.testing.assert_close(sequence.last(x, layout, events), expected)
    if block is DoubledBlockOverCache:
        torch.testing.assert_close(sequence.append(None, x, layout, events)[0], expected)
    else:
        with pytest.raises(UserError, match="keeps nothing of a history"):
            sequence.append(None, x, layout, events)


@pytest.mark.parametrize(("form", "option"), DROPOUT_RATES)
def test_dropout_acts_in_training_alone(form: str, option: str) -> None:
    encoder, inputs = encoder_of(form, **{option: 0.5}), tokens()
    assert not torch.equal(encoder(*inputs), encoder(*inputs))
    encoder.eval()
    assert torch.equal(encoder(*inputs), encoder(*inputs))


@of_every_form
def test_bfloat16_autocast_stays_near_float32(form: str) -> None:
    encoder, inputs = encoder_of(form), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(*inputs)
    torch.testing.assert_close(out.float(), encoder(*inputs), atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in encoder.parameters())


@of_every_form
def test_no_tokens(form: str) -> None:
    out = encoder_of(form)(torch.zeros(0, WIDTH), jagged_layout(torch.tensor([0, 0]), 3), {})
    assert out.shape == (0, WIDTH)
    out.sum().backward()


@pytest.mark.parametrize(("form", "option"), DROPOUT_RATES)
def test_checkpointed_blocks_give_the_same_gradients(form: str, option: str) -> None:
    encoder = encoder_of(form, activation_checkpoint=True, **{option: 0.3})
    gradients = []
    for checkpoint in (True, False):
        encoder.activation_checkpoint = checkpoint
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder(*tokens()).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "HSTU-softmax"])
def test_padded_equals_jagged_under_a_mask_of_both_sides(form: str) -> None:
    encoder, (x, jagged, _) = encoder_of(form), tokens()
    outputs = []
    for layout in (jagged, padded_layout(LENGTHS, COLUMNS)):
        everyone = torch.zeros(layout.num_tokens, dtype=torch.int64)
        both_sides = layout.with_attention_mask(AttentionMask(everyone, everyone))
        outputs.append(layout.to_rectangle(encoder(layout.flatten(jagged.to_rectangle(x)), both_sides, {})))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("next_time", ["given", "hidden"])
@pytest.mark.parametrize("form", ["HSTU", "FuXi"])
def test_whether_the_next_time_is_used(form: str, next_time: str) -> None:
    encoder, (x, layout, events) = encoder_of(form, next_time=next_time), tokens()
    later = {**events, "next_timestamps": events["next_timestamps"] + 10**6}
    same = torch.equal(encoder(x, layout, events), encoder(x, layout, later))
    assert same == (next_time == "hidden")


@pytest.mark.parametrize("form", ["HSTU", "FuXi"])
def test_linear_activation_acts(form: str) -> None:
    silu, none = (encoder_of(form, linear_activation=each) for each in ("silu", "none"))
    assert not torch.allclose(silu(*tokens()), none(*tokens()))
