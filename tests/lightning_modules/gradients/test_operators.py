"""Every operator the recorder splits by itself, over random shapes and groups, against one backward pass per group."""

import importlib

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.lightning_modules.gradients.support import GROUP, Model, normal, parameter, shaken, squares
from tests.oracles.group_gradients import assert_exact, assert_honest

PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)
small = st.integers(1, 4)


@st.composite
def groupings(draw):
    """Groups of a batch: any number, sizes and order, more groups than samples included."""
    num_groups = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["any", "equal"]))
    if kind == "any":
        group = draw(st.lists(st.integers(0, num_groups - 1), min_size=1, max_size=10))
    else:
        group = draw(st.permutations(sorted(list(range(num_groups)) * draw(st.integers(1, 2)))))
        group = sorted(group) if draw(st.booleans()) else group
    return torch.tensor(group), num_groups


def exact(model, x, grouping):
    assert_exact(shaken(model), lambda: squares(model(x)), *grouping)


@PROPERTY
@given(groupings(), st.lists(small, max_size=2), small, small, st.booleans())
def test_linear_on_any_number_of_dimensions(grouping, between, d, p, bias):
    exact(nn.Linear(d, p, bias=bias), normal(len(grouping[0]), *between, d), grouping)


@PROPERTY
@given(groupings(), st.integers(2, 4), small, small)
def test_consecutive_rows_of_a_sample(grouping, rows, d, p):
    assume(len(grouping[0]) > 1)
    model = Model(lambda self, x: self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]), linear=nn.Linear(d, p))
    exact(model, normal(len(grouping[0]), rows, d), grouping)


@pytest.mark.parametrize("positions", [0, 10**9], ids=["by its own kernel", "by patches"])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_to_split_a_convolution(monkeypatch, positions, stride):
    convolution = importlib.import_module("lightning_modules.gradients.operators.convolution")
    monkeypatch.setattr(convolution, "SMALL_GRID", positions)
    for group in (GROUP, GROUP.sort().values, torch.arange(8) // 2):
        exact(nn.Conv2d(3, 4, 3, stride=stride, padding=1), normal(8, 3, 7, 6), (group, 5))


def test_rows_of_a_single_sample_are_not_told_apart():
    """With a batch of one, every dimension of size one looks like it."""
    model = Model(lambda self, x: self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2]), linear=nn.Linear(3, 2))
    x = normal(1, 2, 3)
    assert_honest(model, lambda: squares(model(x)), torch.tensor([0]), 2)


@PROPERTY
@given(groupings(), small, small, st.sampled_from(["@", "mm", "addmm"]))
def test_products_with_a_weight(grouping, d, p, operator):
    functions = {
        "@": lambda self, x: x @ self.weight + self.bias,
        "mm": lambda self, x: torch.mm(x, self.weight) + self.bias,
        "addmm": lambda self, x: torch.addmm(self.bias, x, self.weight),
    }
    exact(Model(functions[operator], weight=parameter(d, p), bias=parameter(p)), normal(len(grouping[0]), d), grouping)


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Conv2d(4, 3, 3), (4, 5, 5)),
        (nn.Conv2d(4, 3, 2, stride=2), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 3, 3), (4, 5, 5)),
        (nn.LayerNorm(4), (5, 4)),
        (nn.GroupNorm(2, 4), (4, 5)),
    ],
)
def test_only_the_weight_or_only_the_bias_is_trained(layer, shape, weight, bias):
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    exact(layer, normal(8, *shape), (GROUP, 5))


@st.composite
def convolutions(draw):
    dims, channel_groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sides = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation = sides(1, 3), sides(1, 2)
    same = draw(st.booleans())
    size = tuple(max(4, d * (k - 1) + 1) for d, k in zip(dilation, kernel, strict=True))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        2 * channel_groups,
        channel_groups,
        kernel,
        stride=1 if same else sides(1, 3),
        padding="same" if same else sides(0, 2),
        dilation=dilation,
        groups=channel_groups,
        bias=draw(st.booleans()),
    )
    return layer, (2 * channel_groups, *size)


@PROPERTY
@given(groupings(), convolutions())
def test_convolutions(grouping, case):
    layer, shape = case
    exact(layer, normal(len(grouping[0]), *shape), grouping)


@pytest.mark.parametrize("kernel", [(1, 2), (2, 2), (3, 4)])
def test_padding_same_under_even_kernels(kernel):
    exact(nn.Conv2d(2, 3, kernel, padding="same", dilation=(1, 2)), normal(8, 2, 5, 6), (GROUP, 5))


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_other_paddings(mode):
    exact(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), normal(8, 2, 5, 6), (GROUP, 5))


@PROPERTY
@given(groupings(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_patches_with_a_remainder(grouping, dims, kernel, remainder):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 3, kernel, stride=kernel)
    exact(layer, normal(len(grouping[0]), 2, *[2 * kernel + min(remainder, kernel - 1)] * dims), grouping)


@PROPERTY
@given(groupings(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_transposed_convolutions(grouping, dims, kernel, stride, dilation, channel_groups):
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
        2 * channel_groups,
        3 * channel_groups,
        kernel,
        stride=stride,
        padding=min(1, kernel - 1),
        output_padding=max(stride, dilation) - 1,
        groups=channel_groups,
        dilation=dilation,
    )
    exact(layer, normal(len(grouping[0]), 2 * channel_groups, *[3] * dims), grouping)


@PROPERTY
@given(groupings(), st.lists(small, min_size=0, max_size=2), st.sampled_from(["layer", "layer2", "rms", "rms2"]))
def test_norms_over_the_last_dimensions(grouping, between, kind):
    shape = (3, 2) if kind.endswith("2") else (5,)
    norm = nn.LayerNorm(shape) if kind.startswith("layer") else nn.RMSNorm(shape)
    exact(norm, normal(len(grouping[0]), *between, *shape), grouping)


@PROPERTY
@given(groupings(), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_group_norm(grouping, dims, norm_groups, contiguous):
    channels = 2 * norm_groups
    shape = (len(grouping[0]), channels, *(3, 2, 2)[:dims])
    x = normal(*shape) if contiguous or dims < 2 else normal(*shape).transpose(-1, -2).contiguous().transpose(-1, -2)
    exact(nn.GroupNorm(norm_groups, channels), x, grouping)


@PROPERTY
@given(groupings(), st.integers(1, 3))
def test_instance_norm(grouping, dims):
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1](3, affine=True)
    exact(norm, normal(len(grouping[0]), 3, *[3] * dims), grouping)


def test_batch_norm_in_evaluation_mode():
    exact(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval(), normal(8, 2, 5, 5), (GROUP, 5))


@PROPERTY
@given(groupings(), st.lists(small, max_size=2), st.sampled_from([None, 0, -1, 2]))
def test_embedding(grouping, shape, padding):
    table = nn.Embedding(6, 3, padding_idx=padding)
    tokens = torch.randint(0, 6, (len(grouping[0]), *shape), generator=torch.Generator().manual_seed(0))
    exact(table, tokens, grouping)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda self, x: x + self.p, (3, 4)),
        (lambda self, x: self.p - x, (4,)),
        (lambda self, x: x * self.p, ()),
        (lambda self, x: x / (3 + self.p.square()), (1, 3, 1)),
        (lambda self, x: 1 / (3 + self.p * self.p * x.square()), (4,)),
        (lambda self, x: x.square() ** self.p, ()),
        (lambda self, x: (1.5 + self.p.square()) ** x, (4,)),
        (lambda self, x: torch.lerp(x, self.p, 0.3), (3, 4)),
        (lambda self, x: torch.addcmul(x, self.p, self.p), (3, 4)),
        (lambda self, x: torch.where(x > 0, x, self.p), ()),
        (lambda self, x: torch.where(x > 0, self.p, self.p.square()), (4,)),
        (lambda self, x: torch.maximum(x, self.p), (4,)),
        (lambda self, x: x.clone().mul_(self.p), (4,)),
        (lambda self, x: x.clone().add_(self.p, alpha=2), ()),
        (lambda self, x: torch.add(input=x, other=self.p, alpha=2), (4,)),
        (lambda self, x: self.p.exp() * x + self.p.cumsum(0), (4,)),
        (lambda self, x: x * self.p.expand(8, -1, -1), (1, 1, 4)),
        (lambda self, x: x * self.p.repeat(8, 1, 1), (1, 3, 4)),
    ],
)
def test_elementwise_parameters(function, shape):
    model = Model(function, p=parameter(*shape))
    exact(model, normal(8, 3, 4), (GROUP, 5))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.prelu(x, self.p[:, 0]),
        lambda self, x: torch.einsum("bnd,nd->bn", x, self.p),
        lambda self, x: torch.einsum("bnd,ed->bne", x, self.p),
        lambda self, x: torch.baddbmm(x @ x.mT, x, self.p.mT.expand(len(x), -1, -1)),
        lambda self, x: torch.cat([x, self.p.expand(len(x), -1, -1)], dim=1).square(),
        lambda self, x: F.bilinear(x[:, 0], x[:, 1], self.p.expand(4, -1, -1).mT @ self.p),
        lambda self, x: torch.mv(x[:, 0], self.p[0]),
        lambda self, x: F.scaled_dot_product_attention(x, x, x, self.p @ self.p.mT),
    ],
)
def test_operators_that_are_split_the_slow_way(function):
    exact(Model(function, p=parameter(3, 4)), normal(8, 3, 4), (GROUP, 5))


@pytest.mark.parametrize("limit", [1, 300, 5000])
def test_weights_larger_than_the_workspace(monkeypatch, limit):
    for operator in ("linear", "embedding"):
        module = importlib.import_module(f"lightning_modules.gradients.operators.{operator}")
        monkeypatch.setattr(module, "WORKSPACE_BYTES", limit)
    tokens = torch.randint(0, 7, (8, 3), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 5))
    exact(model, tokens, (GROUP, 5))
    exact(Model(lambda self, x: self.out(x).tanh() @ self.weight, weight=parameter(5, 4), out=nn.Linear(3, 5)),
          normal(8, 2, 3), (GROUP, 5))  # fmt: skip
