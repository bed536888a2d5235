"""Operators and uses of parameters that the recorder does not know: exact, or listed by name, and never wrong.

Widths, lengths and the batch of eight samples divide one another, so that a dimension mistaken for the batch would fit.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_modules.gradients import GramianRecorder
from tests.lightning_modules.gradients.support import GROUP, Model, normal, parameter, shaken, squares
from tests.oracles.group_gradients import assert_exact, assert_honest


class Product(torch.autograd.Function):
    """x @ weight', in a function of the user's own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


def linears(function, **parts):
    return Model(function, a=nn.Linear(8, 8), b=nn.Linear(8, 8), **parts)


X, SEQUENCES = normal(8, 8), normal(8, 8, 8)


def recurrent(kind, first):
    def forward(self, x):
        x = self.a(x)
        return self.b(self.r(x)[0] if first else self.r(x.transpose(0, 1))[0].transpose(0, 1))

    return linears(forward, r=kind(8, 8, batch_first=first)), SEQUENCES


UNKNOWN = {
    "einsum": lambda: (
        linears(lambda s, x: s.b(torch.einsum("bnd,de->bne", s.a(x), s.w)), w=parameter(8, 8)), SEQUENCES,
    ),
    "bilinear": lambda: (linears(lambda s, x: s.b(s.w(s.a(x), x)), w=nn.Bilinear(8, 8, 8)), X),
    "prelu": lambda: (linears(lambda s, x: s.b(s.w(s.a(x))), w=nn.PReLU(8)), X),
    "gru cell": lambda: (linears(lambda s, x: s.b(s.w(s.a(x), x)), w=nn.GRUCell(8, 8)), X),
    "embedding bag": lambda: (Model(lambda s, x: s.e(x), e=nn.EmbeddingBag(8, 8)), torch.arange(64).view(8, 8) % 7),
    "unfold": lambda: (Model(lambda s, x: s.w @ F.unfold(x, 3), w=parameter(8, 18)), normal(8, 2, 6, 6)),
    "hypernetwork": lambda: (
        Model(
            lambda s, x: torch.bmm(s.h(x).view(-1, 8, 8), s.a(x)[:, :, None])[:, :, 0] + s.c,
            h=nn.Linear(8, 64), a=nn.Linear(8, 8), c=parameter(8),
        ),
        X,
    ),
    "learned step": lambda: (linears(lambda s, x: s.b((x - s.w.detach() * s.a(x)) * s.w.exp()), w=parameter()), X),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_split_the_slow_way_inside_a_model(name):
    model, x = UNKNOWN[name]()
    assert_exact(shaken(model), lambda: squares(model(x)), GROUP, 5)


HARD = {
    "lstm": lambda: recurrent(nn.LSTM, True),
    "gru": lambda: recurrent(nn.GRU, True),
    "lstm, sequence first": lambda: recurrent(nn.LSTM, False),
    "custom function": lambda: (linears(lambda s, x: s.b(Product.apply(s.a(x), s.w)), w=parameter(8, 8)), X),
    "custom function and known": lambda: (
        linears(lambda s, x: s.b(Product.apply(s.a(x), s.w)) + F.linear(x, s.w), w=parameter(8, 8)), X,
    ),
    "attention with weights": lambda: (
        linears(lambda s, x: s.b(s.m(*[s.a(x)] * 3)[0]), m=nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCES,
    ),
    "mask token": lambda: (
        linears(lambda s, x: s.b(s.a(x).clone().index_put((x[..., 0] > 0,), s.t)), t=parameter(8)), SEQUENCES,
    ),
    "script": lambda: (linears(lambda s, x: s.b(s.j(s.a(x))), j=torch.jit.script(nn.Linear(8, 8).double())), X),
    "vmap": lambda: (linears(lambda s, x: torch.func.vmap(lambda row: s.b(s.a(row)))(x)), X),
    "buffer filled in place": lambda: (linears(lambda s, x: s.b(torch.zeros_like(X).add_(s.a(x)))), X),
    "weights in front": lambda: (linears(lambda s, x: s.b((s.w @ s.a(x).T).T), w=parameter(8, 8)), X),
    "einsum, batch last": lambda: (
        linears(lambda s, x: s.b(torch.einsum("bd,ed->eb", s.a(x), s.w).T), w=parameter(8, 8)), X,
    ),
    "experts": lambda: (linears(experts), SEQUENCES),
}  # fmt: skip


def experts(self, x):
    """Tokens are routed to one of two layers, 32 each: a number that the batch divides."""
    tokens = x.flatten(0, 1)
    best = tokens[:, 0].argsort()
    out = torch.zeros_like(tokens)
    for layer, chosen in zip((self.a, self.b), best.chunk(2), strict=True):
        out = out.index_add(0, chosen, layer(tokens[chosen]))
    return out.view_as(x)


def pooled(self, x):
    """Tokens of a mask, of different number per sample, 32 in all."""
    h = self.a(x)
    chosen = (x[..., 0].argsort(1) < torch.tensor([1, 2, 3, 4, 4, 5, 6, 7])[:, None]).nonzero(as_tuple=True)
    return torch.zeros_like(h).index_put(chosen, self.b(h[chosen]))


POSITIONS, INDEX = torch.arange(8), torch.arange(64).view(8, 8) % 5
LAYOUTS = {
    "sequence first": lambda: (linears(lambda s, x: s.b(s.a(x.transpose(0, 1)).tanh()).transpose(0, 1)), SEQUENCES),
    "sequence first, other length": lambda: (
        linears(lambda s, x: s.b(s.a(x.transpose(0, 1)).tanh()).transpose(0, 1)), normal(8, 5, 8),
    ),
    "sequence first, flattened": lambda: (
        linears(lambda s, x: s.b(s.a(x.transpose(0, 1).reshape(-1, 8))).view(8, 8, 8).transpose(0, 1)), SEQUENCES,
    ),
    "sequence first, norm and scale": lambda: (
        linears(lambda s, x: s.b(s.n(s.a(x).permute(1, 0, 2)) * s.g + s.p).permute(1, 0, 2),
                n=nn.LayerNorm(8), g=parameter(8), p=parameter(8, 1, 8)), SEQUENCES,
    ),
    "sequence first, attention": lambda: (
        linears(lambda s, x: s.b(s.m(*[s.a(x.transpose(0, 1))] * 3, need_weights=False)[0]).transpose(0, 1),
                m=nn.MultiheadAttention(8, 2)), SEQUENCES,
    ),
    "attention without residual": lambda: (
        linears(lambda s, x: s.b(s.m(*[s.a(x)] * 3, need_weights=False)[0]),
                m=nn.MultiheadAttention(8, 2, batch_first=True)), SEQUENCES,
    ),
    "tokens first": lambda: (Model(lambda s, x: s.e(x.t()).transpose(0, 1), e=nn.Embedding(8, 8)), INDEX),
    "torch encoder, sequence first": lambda: (
        Model(lambda s, x: s.t(x.transpose(0, 1)).transpose(0, 1), t=nn.TransformerEncoderLayer(8, 2, 8)), SEQUENCES,
    ),
    "codebook": lambda: (
        linears(lambda s, x: (s.b(s.a(x)) - s.c[:, None]).square().sum(-1).T, c=parameter(8, 8)), X,
    ),
    "heads in front": lambda: (
        linears(lambda s, x: s.b(torch.cat((torch.cat(s.a(x).chunk(2, -1)) * s.g).chunk(2), -1)), g=parameter(4)), X,
    ),
    "two views": lambda: (linears(lambda s, x: s.b(s.a(torch.cat([x, x + 1]))).view(2, 8, 8).transpose(0, 1)), X),
    "repeated": lambda: (linears(lambda s, x: s.b(s.a(x.repeat(2, 1)) ** 2).view(2, 8, 8).transpose(0, 1)), X),
    "null token": lambda: (
        linears(lambda s, x: s.b(torch.cat([s.a(x), s.t.expand(8, -1)])).view(2, 8, 8).tanh().prod(0),
                t=parameter(1, 8)), X,
    ),
    "shuffled": lambda: (linears(lambda s, x: s.b(s.a(x[[3, 1, 0, 2, 5, 7, 6, 4]])).flip(0)), X),
    "flipped": lambda: (linears(lambda s, x: s.b(s.a(x.flip(0))).flip(0)), X),
    "chosen tokens": lambda: (linears(pooled), SEQUENCES),
    "one by one": lambda: (linears(lambda s, x: torch.stack([s.b(s.a(row)) for row in x])), X),
    "in chunks": lambda: (linears(lambda s, x: torch.cat([s.b(s.a(part)) for part in x.chunk(2)])), X),
    "positions held as an attribute": lambda: (
        linears(lambda s, x: s.b(s.a(x) + s.e(POSITIONS)), e=nn.Embedding(8, 8)), SEQUENCES,
    ),
    "positions from numpy": lambda: (
        linears(lambda s, x: s.b(s.a(x) + s.e(torch.from_numpy(np.arange(8)))), e=nn.Embedding(8, 8)), SEQUENCES,
    ),
    "relative positions": lambda: (linears(lambda s, x: s.a(x) @ s.b(x).mT + s.t[INDEX], t=parameter(5)), SEQUENCES),
}  # fmt: skip


@pytest.mark.parametrize("name", [*HARD, *LAYOUTS])
def test_never_silently_wrong(name):
    model, x = {**HARD, **LAYOUTS}[name]()
    assert_honest(shaken(model), lambda: squares(model(x)), GROUP, 5)


MIXING = {
    "centred": lambda s, x: s.b(s.a(x) - s.a(x).mean(0)),
    "normalised": lambda s, x: s.b((s.a(x) - s.a(x).mean(0)) * (s.a(x).var(dim=(0,)) + 1).rsqrt()),
    "attention over samples": lambda s, x: s.b((s.a(x) @ s.a(x).T).softmax(1) @ s.a(x)),
    "covariance": lambda s, x: s.b(s.a(x) @ (s.a(x).T @ s.a(x))),
    "with a parameter": lambda s, x: torch.einsum("bi,ci,ij->bj", s.a(x), s.a(x), s.b.weight),
    "pairs": lambda s, x: s.b(s.a(x) + s.a(x).roll(1, 0)),
    "halves": lambda s, x: s.b(torch.cat([s.a(x)[4:], s.a(x)[:4]])),
    "largest": lambda s, x: s.b(s.a(x) + s.a(x).amax(0, keepdim=True)),
    "rows in a loop": lambda s, x: s.b(torch.stack(s.a(x).unbind(0)[::-1])),
    "a layer over samples": lambda s, x: s.b(s.a(x).T).T,
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_not_counted_as_covered(name):
    model = shaken(linears(MIXING[name]))
    assert_honest(model, lambda: squares(model(X)), GROUP, 5)


def test_a_regulariser_belongs_to_no_group():
    model = shaken(linears(lambda s, x: s.b(s.a(x).tanh())))
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        (squares(model(X)).mean() + 0.1 * model.a.weight.square().sum()).backward()
    gramian = recorder.result()
    assert gramian.uncovered == ("a.weight",)
    assert gramian.coverage == pytest.approx(80 / 144)


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_use_outside_of_the_recorder_is_noticed(zeroed):
    """Also where gradients are set to zero instead of None, as ``zero_grad(set_to_none=False)`` does."""
    model = shaken(linears(lambda s, x: s.b(s.a(x).tanh())))
    if zeroed:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    outside = model.a(X).square().mean()
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        (squares(model(X)).mean() + outside).backward()
    assert set(recorder.result().uncovered) == {"a.weight", "a.bias"}


def test_batch_norm_in_training_mode_is_refused():
    model = Model(lambda s, x: s.n(s.a(x)), a=nn.Linear(8, 8), n=nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match="batch norm"), GramianRecorder(model, GROUP, 5):
        model(X)


def test_parameters_without_a_gradient_are_covered_and_zero():
    model = shaken(linears(lambda s, x: s.a(x)))
    gramian = assert_exact(model, lambda: squares(model(X)), GROUP, 5)
    assert not gramian.values[gramian.layers.index("b")].any()


def test_changes_in_place():
    functions = [
        lambda s, x: s.b(s.a(x).relu_()),
        lambda s, x: s.b(s.a(x).mul_(2).add_(x)),
        lambda s, x: s.b(s.a(x)).add_(s.a.bias),
        lambda s, x: s.b.bias.expand(len(x), -1).clone().add_(s.a(x)),
    ]
    for function in functions:
        model = shaken(linears(function))
        assert_honest(model, lambda model=model: squares(model(X)), GROUP, 5)


def test_a_vector_times_each_sample():
    model = shaken(linears(lambda s, x: torch.stack([s.a.bias @ row for row in s.b(x)])))
    assert_honest(model, lambda: squares(model(X)), GROUP, 5)
