"""Everything that may happen to a backward pass: accumulation, checkpoints, compilation, exceptions."""

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lightning_modules.gradients import GramianRecorder
from lightning_modules.gradients.gramian import layer_of
from tests.lightning_modules.gradients.support import GROUP, Model, normal, parameter, shaken, squares
from tests.oracles.group_gradients import assert_exact, errors, record, trainable, truth

X = normal(8, 3, 8)


def network():
    return shaken(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)))


def modes() -> int:
    return len(_get_current_function_mode_stack())


def grads(model):
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def assert_same(found, expected, tolerance=1e-12):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def test_accumulation_over_micro_batches_of_unequal_composition_equals_their_union():
    model = network()
    groups = [torch.tensor([0, 0, 1, 2]), torch.tensor([3, 3, 3, 0]), torch.tensor([1, 2, 2, 2])]
    x = normal(12, 3, 8)
    expected = truth(model, lambda: squares(model(x)), torch.cat(groups), 5)
    recorder = GramianRecorder(model, groups[0], 5, retain=True)
    for index, (group, part) in enumerate(zip(groups, x.chunk(3), strict=True)):
        if index:
            recorder.regroup(group)
        with recorder:
            (squares(model(part)).mean() / 3).backward()
    gramian = recorder.result()
    assert gramian.coverage == 1.0
    assert gramian.counts.tolist() == [3, 2, 4, 3, 0]
    assert max(errors(gramian, expected).values()) < 1e-10
    assert_same(grads(model), expected.grad)


def test_micro_batches_of_unequal_size_add_up_under_a_sum():
    model = network()
    expected = truth(model, lambda: squares(model(X)), GROUP, 5, "sum")
    first, second = X[:3], X[3:]
    recorder = GramianRecorder(model, GROUP[:3], 5, retain=True, reduction="sum")
    with recorder:
        squares(model(first)).sum().backward()
    recorder.regroup(GROUP[3:])
    with recorder:
        squares(model(second)).sum().backward()
    gramian = recorder.result()
    assert gramian.coverage == 1.0
    assert max(errors(gramian, expected).values()) < 1e-10


def test_two_backward_passes_without_retain_are_reported():
    model = network()
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        squares(model(X)).mean().backward()
        squares(model(X)).mean().backward()
    gramian = recorder.result()
    assert gramian.coverage == 0.0
    assert set(gramian.uncovered) == set(trainable(model))


def test_two_losses_of_one_forward_pass_are_reported():
    model = network()
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        losses = squares(model(X))
        losses[:4].sum().backward(retain_graph=True)
        losses[4:].sum().backward()
    assert recorder.result().coverage == 0.0


def assert_checkpointed(model, reentrant, x=X):
    """Exact or honest against the same model without checkpoints; ``model.run(segment, x)`` decides."""
    model.run = lambda segment, x: segment(x)
    expected = truth(model, lambda: squares(model(x)), GROUP, 5)
    model.run = lambda segment, x: checkpoint(segment, x, use_reentrant=reentrant)
    gramian, grad = record(model, lambda: squares(model(x)), GROUP, 5)
    assert_same(grad, expected.grad)
    wrong = {layer for layer, error in errors(gramian, expected).items() if not error < 1e-10}
    assert wrong <= {layer_of(name) for name in gramian.uncovered}
    return gramian


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    """One layer is shared by two checkpointed segments, and a parameter meets the batch in each kind of operator."""

    def segment(self, x):
        return self.shared(self.norm(x)).tanh() * self.gamma + torch.einsum("bnd,ed->bne", x, self.unknown)

    def forward(self, x):
        x = self.first(x)
        x = self.run(lambda x: segment(self, x), x)
        x = self.run(lambda x: self.shared(x.sin()), x)
        return self.last(x)

    model = shaken(
        Model(
            forward,
            first=nn.Linear(8, 8),
            shared=nn.Linear(8, 8),
            norm=nn.LayerNorm(8),
            gamma=parameter(8),
            unknown=parameter(8, 8),
            last=nn.Linear(8, 4),
        )
    )
    assert assert_checkpointed(model, reentrant).coverage == 1.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_parametrized_weight_that_comes_last(reentrant):
    """Its gradient is pulled back through a graph that lies within the segment."""
    inner = nn.Sequential(nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model = Model(
        lambda s, x: s.last(s.run(s.inner, s.first(x))),
        first=nn.Linear(8, 8),
        inner=inner,
        last=nn.Linear(8, 4),
    )
    assert assert_checkpointed(shaken(model), reentrant).coverage == 1.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_an_unknown_operator_that_comes_last(reentrant):
    model = Model(
        lambda s, x: s.last(s.run(lambda x: torch.einsum("bnd,ed->bne", x.sin(), s.w), s.first(x))),
        first=nn.Linear(8, 8),
        w=parameter(8, 8),
        last=nn.Linear(8, 4),
    )
    assert assert_checkpointed(shaken(model), reentrant).coverage == 1.0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_sequence_first_samples(reentrant):
    x = normal(8, 8, 8)
    model = Model(
        lambda s, x: s.last(s.run(s.inner, s.first(x.transpose(0, 1)))).transpose(0, 1),
        first=nn.Linear(8, 8),
        inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        last=nn.Linear(8, 4),
    )
    assert_checkpointed(shaken(model), reentrant, x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    model = network()
    compiled = torch.compile(model, backend=backend)
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    compiled(X)  # compiled before
    for called in (compiled, model):
        if called is model:
            model.compile(backend=backend)
        model.zero_grad()
        recorder = GramianRecorder(model, GROUP, 5)
        with recorder:
            squares(called(X)).mean().backward()
        gramian = recorder.result()
        assert gramian.coverage == 1.0
        assert max(errors(gramian, expected).values()) < 1e-10
        assert_same(grads(model), expected.grad)
        squares(called(X)).mean().backward()  # and still runs without


def test_a_forward_pass_without_gradients_inside():
    """As self-conditioning does."""

    def forward(self, x):
        with torch.no_grad():
            guess = self.inner(x)
        return self.last(self.inner(x + guess).tanh())

    model = Model(forward, inner=nn.Linear(8, 8), last=nn.Linear(8, 4))
    assert_exact(shaken(model), lambda: squares(model(X)), GROUP, 5)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_no_mode_behind(where):
    model = network()
    handle = None

    def fail(*_):
        raise RuntimeError("on purpose")

    if where == "backward":
        handle = model[0].bias.register_hook(fail)
    recorder = GramianRecorder(model, GROUP, 5)
    with pytest.raises(RuntimeError, match="on purpose"), recorder:  # noqa: PT012
        losses = squares(model(X))
        if where == "forward":
            fail()
        losses.mean().backward()
    assert modes() == 0
    if handle is not None:
        handle.remove()
    compiled = torch.compile(lambda x: x.sin(), backend="eager")
    compiled(X)  # the stance is the user's again
    assert_exact(model, lambda: squares(model(X)), GROUP, 5)


def test_no_mode_is_left_after_use():
    model = network()
    record(model, lambda: squares(model(X)), GROUP, 5)
    assert modes() == 0


def test_the_result_can_be_read_twice():
    model = network()
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        squares(model(X)).mean().backward()
    first, second = recorder.result(), recorder.result()
    assert first.coverage == second.coverage == 1.0
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=0)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    gramian = assert_exact(model, lambda: squares(model(X)), GROUP, 5)
    assert gramian.layers == ("1", "3")


def test_gradients_that_exist_before_are_added_to():
    model = network()
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        squares(model(X)).mean().backward()
    gramian = recorder.result()
    assert gramian.coverage == 1.0
    assert max(errors(gramian, expected).values()) < 1e-10
    assert_same(grads(model), {name: 1 + grad for name, grad in expected.grad.items()})


@pytest.mark.parametrize("call", ["backward", "autograd", "gradient", "vector"])
def test_every_way_to_start_a_backward_pass(call):
    model = network()
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        losses = squares(model(X))
        if call == "backward":
            losses.mean().backward()
        elif call == "autograd":
            torch.autograd.backward([losses.mean()])
        elif call == "gradient":
            (losses.mean() * 4).backward(gradient=torch.tensor(0.25, dtype=torch.float64))
        else:
            losses.backward(torch.full((8,), 1 / 8, dtype=torch.float64))
    gramian = recorder.result()
    assert gramian.coverage == 1.0
    assert max(errors(gramian, expected).values()) < 1e-10
    assert_same(grads(model), expected.grad)


def test_a_backward_pass_to_some_inputs_leaves_the_others_alone():
    model = network()
    inputs = list(model[3].parameters())
    recorder = GramianRecorder(model, GROUP, 5)
    with recorder:
        squares(model(X)).mean().backward(inputs=inputs)
    gramian = recorder.result()
    assert model[0].weight.grad is None
    expected = truth(model, lambda: squares(model(X)), GROUP, 5)
    wrong = {layer for layer, error in errors(gramian, expected).items() if error > 1e-10}
    assert wrong == {"0", "1"}  # without a gradient: zero, as their .grad
    assert not gramian.values[:2].any()


def test_a_vector_is_no_loss():
    model = network()
    with pytest.raises(RuntimeError, match="scalar"), GramianRecorder(model, GROUP, 5):
        squares(model(X)).backward()
    assert modes() == 0
