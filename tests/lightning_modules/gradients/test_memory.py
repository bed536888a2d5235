"""What a measurement keeps: the groups' gradients of one layer at a time, and next to nothing afterwards."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.gradients import GramianRecorder
from tests.lightning_modules.gradients.support import Model, normal, squares

GROUPS = 16
LAYERS = 6


class Living(TorchDispatchMode):
    """Bytes of the storages that operators make, while they live: ``now``, and the largest so far, ``peak``."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key, size):
        del self._alive[key]
        self.now -= size


def measure(model, x, group, recorded, **settings):
    """Peak bytes of a training step's forward and backward pass, and what remains of them."""
    model.zero_grad(set_to_none=True)
    losses = lambda: squares(model(x)).mean()  # noqa: E731
    recorder = GramianRecorder(model, group, GROUPS, **settings) if recorded else None
    with Living() as living:
        if recorder is None:
            losses().backward()
        else:
            with recorder:
                losses().backward()
        for p in model.parameters():
            p.grad = None
    return living.peak, living.now


def stack(shared):
    layers = [nn.Linear(64, 64) for _ in range(LAYERS)]
    return Model(lambda s, x: s.layers(x), layers=nn.Sequential(*([layers[0]] * LAYERS if shared else layers)))


LARGEST = 64 * 64 * 8


def test_the_count_sees_what_lives():
    with Living() as living:
        kept = torch.ones(1000, dtype=torch.float64).mul(2)
    assert (living.now, living.peak) == (8000, 16000)
    del kept
    assert living.now == 0


@pytest.mark.parametrize("ordered", [True, False])
def test_at_most_one_layers_gradients_of_all_groups_at_a_time(ordered):
    """A margin of two weights is for one layer's sum over groups, biases and copies of activations."""
    model, x = stack(shared=False), normal(32, 2, 64)
    group = torch.arange(32) // 2 if ordered else torch.arange(32) % GROUPS
    plain, left = measure(model, x, group, recorded=False)
    peak, remaining = measure(model, x, group, recorded=True)
    assert peak - plain <= (GROUPS + 2) * LARGEST
    assert remaining - left <= (GROUPS + 1) * LARGEST  # the workspace, until the recorder goes


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("ordered", [True, False])
def test_convolutions_keep_no_more_than_linear_layers(side, ordered):
    """Up to one group's patches, and copies of activations put in order."""
    model = Model(lambda s, x: s.layers(x), layers=nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]))
    x = normal(32, 64, side, side)
    group = torch.arange(32) // 2 if ordered else torch.arange(32) % GROUPS
    plain, _ = measure(model, x, group, recorded=False)
    peak, _ = measure(model, x, group, recorded=True)
    patches = 9 * x[:2].nbytes
    copies = 0 if ordered else 2 * x.nbytes
    assert peak - plain <= (GROUPS + 2) * 9 * LARGEST + patches + copies


def test_a_pass_without_gradients_keeps_nothing_more():
    """Self-conditioning calls every layer once more, without a gradient: layers are still passed on one by one."""
    model, x = stack(shared=False), normal(32, 2, 64)

    def twice(self, x):
        with torch.no_grad():
            guess = self.layers(x)
        return self.layers(x + guess)

    group = torch.arange(32) // 2
    model.function = twice
    plain, _ = measure(model, x, group, recorded=False)
    peak, _ = measure(model, x, group, recorded=True)
    assert peak - plain <= (GROUPS + 2) * LARGEST


def test_a_shared_weight_is_kept_until_its_last_use():
    """Not for longer, and once for all of its uses."""
    model, x = stack(shared=True), normal(32, 2, 64)
    group = torch.arange(32) // 2
    plain, left = measure(model, x, group, recorded=False)
    peak, remaining = measure(model, x, group, recorded=True)
    assert GROUPS * LARGEST <= peak - plain <= (3 * GROUPS + 2) * LARGEST  # kept, one use's, and the workspace
    assert remaining - left <= (GROUPS + 1) * LARGEST


def test_accumulation_keeps_all_groups_gradients():
    """As documented, K times the model; which shows that the count above could have seen them."""
    model, x = stack(shared=False), normal(32, 2, 64)
    _, remaining = measure(model, x, torch.arange(32) // 2, recorded=True, retain=True)
    assert remaining >= LAYERS * GROUPS * LARGEST
