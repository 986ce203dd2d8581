"""Arguments that are not inverted: by position and keyword, in modules, couplings and sequences of them."""

import copy

import pytest
import torch
from torch import nn

import recollect.invertible as inn
from recollect.memory import peak_memory
from recollect.testing import check_invertible

FLAGS = [{}, {"invertible": False}, {"checkpoint": False}]
everywhere = pytest.mark.parametrize("flags", FLAGS, ids=str)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


class Block(nn.Module):
    """A network of a group and a condition, which can also be given by name."""

    def __init__(self, size, condition, out):
        super().__init__()
        self.first, self.second = nn.Linear(size + condition, 8), nn.Linear(8, out)

    def forward(self, z, c):
        return self.second(torch.cat([z, c], 1).tanh() @ self.first.weight.t()).sin()


class ByClass(nn.Module):
    """A network of a group and a class label."""

    def __init__(self, size, out, classes=3):
        super().__init__()
        self.table, self.linear = nn.Embedding(classes, size), nn.Linear(size, out)

    def forward(self, z, *, label):
        return self.linear((z + self.table(label)).tanh())


class Scale(inn.Module):
    """y = x * exp(net(c)), by position."""

    def __init__(self, size, condition):
        super().__init__()
        self.net = nn.Linear(condition, size)

    @property
    def reversible(self):
        return True

    def _log_scale(self, c):
        return self.net(c).tanh()

    def function(self, x, c):
        return x * self._log_scale(c).exp()

    def inverse(self, y, c):
        return y * (-self._log_scale(c)).exp()

    def function_and_log_det(self, x, c):
        return self.function(x, c), self._log_scale(c).sum(1)


class Named(Scale):
    """The same by keyword alone."""

    def function(self, x, *, c):
        return x * self._log_scale(c).exp()

    def inverse(self, y, *, c):
        return y * (-self._log_scale(c)).exp()

    def function_and_log_det(self, x, *, c):
        return self.function(x, c=c), self._log_scale(c).sum(1)


class Optional(Scale):
    """Without a condition the identity."""

    def function(self, x, c=None):
        return x * 1 if c is None else super().function(x, c)

    def inverse(self, y, c=None):
        return y * 1 if c is None else super().inverse(y, c)

    def function_and_log_det(self, x, c=None):
        return (self.function(x), x.new_zeros(len(x))) if c is None else super().function_and_log_det(x, c)


class Declared(inn.Module):
    """Of any number of conditions: how many, only the module can say."""

    num_conditions = 1

    def function(self, *args):
        x, c = args
        return x + c.sin()

    def inverse(self, *args):
        y, c = args
        return y - c.sin()


class Hidden(Scale):
    """Hides what its inverse needs beside the condition."""

    num_conditions = 1
    num_outputs = 1

    def function(self, x, c):
        return x.square() * self._log_scale(c).exp(), x.sign()

    def inverse(self, y, sign, c):
        return sign * (y * (-self._log_scale(c)).exp()).sqrt()

    def function_and_log_det(self, x, c):
        return (*self.function(x, c), (self._log_scale(c) + (2 * x.abs()).log()).sum(1))


def flow(kind=Scale):
    """Layers with and without conditions, of four channels and three numbers of condition."""
    return inn.Sequential(
        inn.ActNorm(4),
        kind(4, 3),
        inn.Linear(4, 4, parametrization="lu"),
        inn.AffineCoupling(Block(2, 3, 4), Block(2, 3, 4)),
        inn.Sequential(inn.BatchNorm1d(4), inn.AdditiveCoupling(Block(2, 3, 2), nn.Linear(2, 2))),
        inn.Asinh(),
    )


def inputs(size=5):
    return torch.randn(size, 4), torch.randn(size, 3)


def gradients(model, run, x, c, parameters=None):
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    output = run(x * 1, c * 1)
    outputs = output if isinstance(output, tuple) else (output,)
    loss = sum((out.sin() * torch.linspace(1, 2, out.numel()).view_as(out)).sum() for out in outputs)
    wanted = [x, c, *model.parameters()]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def assert_plain(model, run, x, c, flags, tolerance=1e-9):
    """Gradients under these flags are those with everything kept."""
    before = copy.deepcopy(model.state_dict())
    with model.temp_mode(**flags):
        found = gradients(model, run, x, c)
    model.load_state_dict(before)
    parts = [part for part in model.modules() if isinstance(part, inn.Module)]
    kept = [part.checkpoint for part in parts]
    for part in parts:
        part.checkpoint = False
    expected = gradients(model, run, x, c)
    for part, flag in zip(parts, kept, strict=True):
        part.checkpoint = flag
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@everywhere
@pytest.mark.parametrize("kind", [Scale, Named, Optional, Declared, Hidden])
def test_a_module_with_a_condition(kind, flags):
    module = kind() if kind is Declared else kind(4, 3)
    x, c = inputs()
    c = torch.randn(5, 4) if kind is Declared else c
    given = ((), {"c": c}) if kind is Named else ((c,), {})
    with module.temp_mode(**flags):
        assert module.check(x, *given[0], rtol=1e-9, atol=1e-9, **given[1])
        if kind is Named:
            assert_plain(module, lambda x, c: module(x, c=c), x, c, flags)
        else:
            assert_plain(module, module, x, c, flags)


def test_a_chain_of_conditioned_modules_keeps_one_tensor():
    def peak(layers):
        model = inn.Sequential(*(Scale(400, 3) for _ in range(layers)))
        for parameter in model.parameters():
            parameter.data.mul_(0.1)
            parameter.grad = torch.zeros_like(parameter)
        x, c = torch.randn(100, 400), torch.randn(100, 3)
        with peak_memory() as memory:
            model(x.requires_grad_() * 1, c).square().mean().backward()
        return memory.peak_bytes

    assert peak(16) < 1.2 * peak(4)


@pytest.mark.parametrize("given", ["position", "keyword"])
def test_an_inverse_of_its_own_log_determinant(given):
    module = Scale(4, 3) if given == "position" else Named(4, 3)
    x, c = inputs()
    args, kwargs = ((c,), {}) if given == "position" else ((), {"c": c})
    y, log_det = module.forward_and_log_det(x, *args, **kwargs)
    back, inverse = module.inverse_and_log_det(y, *args, **kwargs)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_det)


@everywhere
@pytest.mark.parametrize("kind", [Scale, Optional, Hidden])
def test_a_flow_hands_its_condition_to_every_layer_that_takes_it(kind, flags):
    model = flow(kind)
    x, c = inputs()
    model(x, c)  # initialises
    assert_plain(model, model, x, c, flags, 1e-7)
    assert_plain(model, model.forward_and_log_det, x, c, flags, 1e-7)
    with model.temp_mode(**flags):
        assert model.check(x, c, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "reversed"])
def test_log_determinant_and_inverse_of_a_conditional_flow(direction):
    model = flow().eval()
    if direction == "reversed":
        model[4][0] = inn.ActNorm(4)  # reversible
        model.reverse()
    x, c = 0.3 * torch.randn(5, 4), torch.randn(5, 3)
    y, log_det = model.forward_and_log_det(x, c)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda r, i=i: model(r[None], c[i : i + 1])[0], x[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[i])
    torch.testing.assert_close(model.inverse(y, c), x)
    back, inverse = model.inverse_and_log_det(y, c)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -log_det)
    assert not torch.allclose(model(x, c + 1), y)


@everywhere
@pytest.mark.parametrize("kind", ["additive", "affine"])
def test_a_class_by_keyword(kind, flags):
    coupling, factor = {"additive": (inn.AdditiveCoupling, 1), "affine": (inn.AffineCoupling, 2)}[kind]
    model = inn.Sequential(
        inn.ActNorm(4),
        coupling(ByClass(2, 2 * factor), ByClass(2, 2 * factor)),
        coupling(ByClass(2, 2 * factor), nn.Linear(2, 2 * factor)),
        inn.Linear(4, 4),
    )
    x, label = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model(x, label=label)
    assert_plain(model, lambda x, c: model.forward_and_log_det(x, label=label), x, x[:, :3], flags)
    y = model(x, label=label)
    torch.testing.assert_close(model.inverse(y, label=label), x)
    assert not torch.allclose(model.inverse(y, label=label.flip(0)), x)
    with model.temp_mode(**flags):
        assert model.check(x, label=label, rtol=1e-8, atol=1e-8)
    assert check_invertible(model[2], x, label=label)


@everywhere
def test_keyword_tensors_of_blocks_get_their_gradient(flags):
    model = inn.AffineCoupling(Block(2, 3, 4), Block(2, 3, 4))
    x, c = inputs()
    assert_plain(model, lambda x, c: model(x, c=c), x, c, flags)
    assert_plain(model.reverse(), lambda x, c: model(x, c=c), x, c, flags)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_block_gets_what_its_signature_takes(groups, reverse):
    blocks = [Block(2, 3, 2), *(nn.Linear(2, 2) for _ in range(groups - 2)), ByClass(2, 2)]
    model = inn.AdditiveCoupling(*blocks).reverse(reverse)
    x, c = torch.randn(6, 2 * groups), torch.randn(6, 3)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    assert_plain(model, lambda x, c: model(x, c, label=label), x, c, {})
    torch.testing.assert_close(model.call_inverse(model(x, c, label=label), c, label=label), x)
    with pytest.raises(TypeError, match="blocks take 1 positional"):
        model(x, c, c, label=label)
    with pytest.raises(TypeError, match=r"none of its blocks takes the keyword argument\(s\) \['lable'\]"):
        model(x, c, lable=label)


@everywhere
def test_what_no_layer_takes(flags):
    model = inn.Sequential(inn.ActNorm(4), inn.Sequential(inn.Linear(4, 4)))
    x, c = inputs()
    with model.temp_mode(**flags):
        with pytest.raises(TypeError, match="none of its layers takes argument 1"):
            model(x, c)
        with pytest.raises(TypeError, match="none of its layers takes keyword 'c'"):
            model(x, c=c)
        with pytest.raises(TypeError, match="none of its layers takes keyword 'c'"):
            model.forward_and_log_det(x, c=c)
    with pytest.raises(TypeError, match="none of its layers takes argument 1"):
        model.inverse(x, c)


class Rotate(inn.Module):
    """Two streams."""

    def function(self, x, y):
        return x * 0.6 - y * 0.8, x * 0.8 + y * 0.6

    def inverse(self, u, v):
        return u * 0.6 + v * 0.8, v * 0.6 - u * 0.8


class Join(inn.Module):
    """Two streams become one."""

    def function(self, x, y):
        return torch.cat([x, y], 1)

    def inverse(self, z):
        return z.chunk(2, 1)


@everywhere
def test_several_outputs_are_still_the_arguments_of_the_next(flags):
    model = inn.Sequential(Rotate(), inn.Identity(), Rotate(), Join(), Scale(8, 3), inn.ActNorm(8))
    x, y, c = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 3)
    model(x, y, c)
    assert_plain(model, lambda x, c: model(x, y, c), x, c, flags)
    out = model(x, y, c)
    assert out.shape == (5, 8)
    for found, expected in zip(model.inverse(out, c), (x, y), strict=True):
        torch.testing.assert_close(found, expected)
    with model.temp_mode(**flags):
        assert model.check(x, y, c, rtol=1e-9, atol=1e-9)


def test_forward_hooks_of_nested_sequences_run_with_conditions():
    model, seen = flow(), []
    model[4].register_forward_hook(lambda module, args, output: seen.append(len(args)))
    model(*inputs())
    assert seen == [2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch.compile itself
@pytest.mark.parametrize("what", ["model", "blocks"])
def test_under_torch_compile_conditions_arrive(what):
    blocks = [Block(2, 3, 2), nn.Linear(2, 2)]
    x, c = inputs()
    scale = Scale(4, 3)
    model = inn.Sequential(inn.AdditiveCoupling(*blocks), scale)
    if what == "model":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    else:
        compiled = inn.Sequential(inn.AdditiveCoupling(*(torch.compile(b, backend="eager") for b in blocks)), scale)
    torch.testing.assert_close(compiled(x, c), model(x, c))


def test_a_container_as_condition():
    class Shift(inn.Module):
        def function(self, x, given):
            return x + given["by"].sin()

        def inverse(self, y, given):
            return y - given["by"].sin()

    model = inn.Sequential(Shift(), Shift())
    x, by = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
    torch.autograd.grad(model(x, {"by": by * 1}).square().sum(), by)
    assert torch.allclose(model.inverse(model(x, {"by": by}), {"by": by}), x)
