"""What InvTorch 0.5.0 documents, by its names: code that was written for it runs after its import is changed."""

import contextlib
import io
import re
import runpy
from importlib import metadata

import pytest
import torch
from torch import nn

import recollect
import recollect.invertible as inn

# The example of InvTorch's README, with its two imports for ours.
EXAMPLE = """
import torch
from torch import nn

import recollect.invertible as inn


class InvertibleLinear(inn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def function(self, inputs):
        return inputs @ self.weight.T + self.bias

    def inverse(self, outputs):
        return (outputs - self.bias) @ self.weight.T.pinverse()


if __name__ == '__main__':
    x = torch.randn(10, 3)
    model = InvertibleLinear(3, 5)
    print('Is invertible:', model.check(x))

    y = model(x)
    print('Input was freed:', x.storage().size() == 0)

    y.backward(torch.randn_like(y))
    print('Input was restored:', x.storage().size() != 0)
"""


def run_example(tmp_path, eager):
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE)
    printed = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed), recollect.eager_release(eager):
        names = runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue().splitlines(), names


# torch says that `x.storage()`, which the example calls, is on its way out.
storage_is_deprecated = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


@storage_is_deprecated
def test_the_example(tmp_path):
    printed, names = run_example(tmp_path, eager=False)
    assert printed == ["Is invertible: True", "Input was freed: False", "Input was restored: True"]
    assert names["model"].weight.grad is not None


@storage_is_deprecated
def test_the_example_with_eager_release(tmp_path):
    printed, names = run_example(tmp_path, eager=True)
    assert printed == ["Is invertible: True", "Input was freed: True", "Input was restored: True"]
    torch.manual_seed(0)
    assert torch.allclose(names["x"], torch.randn(10, 3), atol=1e-5)
    torch.manual_seed(0)
    x, module = torch.randn(10, 3), names["InvertibleLinear"](3, 5)
    module.checkpoint = False
    module(x).backward(torch.randn(10, 5))
    assert torch.allclose(names["model"].weight.grad, module.weight.grad, atol=1e-4)


def test_the_example_is_the_one_of_the_readme():
    try:
        text = metadata.metadata("invtorch").json["description"]
    except metadata.PackageNotFoundError:
        pytest.skip("invtorch is not installed")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert example.replace("import invtorch.nn as inn", "import recollect.invertible as inn").strip() == EXAMPLE.strip()


def test_the_names_of_modules():
    names = ["Module", "Sequential", "Identity"]
    assert all(hasattr(inn, name) for name in names)
    members = [
        "function",
        "inverse",
        "forward",
        "check",
        "reverse",
        "reversible",
        "reversed",
        "checkpoint",
        "invertible",
        "seed",
        "num_outputs",
        "num_inputs",
        "process",
        "call_function",
        "call_inverse",
        "temp_mode",
        "get_extra_state",
        "set_extra_state",
        "extra_repr",
    ]
    assert [name for name in members if not hasattr(inn.Module, name)] == []
    assert not [
        n for n in ["checkpoint", "dry_mode", "in_dry_mode", "backward_mode", "in_backward"] if n not in dir(recollect)
    ]


class Exponent(inn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(3) + 0.5)

    def function(self, x, *others):
        return (x * self.w, *others) if others else x * self.w

    def inverse(self, y, *others):
        return (y / self.w, *others) if others else y / self.w

    @property
    def reversible(self):
        return True


def test_illegal_memory_accesses_of_the_readme_are_legal():
    """Its README warns of ``x + f(x)``, whose input it frees before the sum, and of ``f(x) + x.clone()``."""
    torch.manual_seed(0)
    module = Exponent().double()
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for residual in (
        lambda x: x + module(x),
        lambda x: module(x) + x,
        lambda x: x.clone() + module(x),
        lambda x: module(x) + x.clone(),
    ):
        found = torch.autograd.grad(residual(residual(leaf * 1.0)).sin().sum(), [leaf, module.w])
        with module.temp_mode(checkpoint=False):
            expected = torch.autograd.grad(residual(residual(leaf * 1.0)).sin().sum(), [leaf, module.w])
        for f, e in zip(found, expected, strict=True):
            assert torch.allclose(f, e, rtol=1e-10, atol=1e-12)


def test_illegal_memory_accesses_under_eager_release_are_errors():
    module, x = Exponent(), torch.randn(5, 3)
    with recollect.eager_release():
        y = module(x)
        with pytest.raises(recollect.frames.ReleasedTensorError, match="Exponent"):
            x + y
        y.sum().backward()
        assert torch.allclose(x * module.w, y)


def test_keep_under_eager_release():
    module, x, z = Exponent(), torch.randn(5, 3), torch.randn(5, 3)
    with recollect.eager_release():
        y, w = module(x, z * 1.0, keep=(x,))
        assert torch.allclose(x * module.w, y)
        module.reverse()(y, w)[0].sum().backward()


@pytest.mark.parametrize("seed", [True, False])
def test_the_functional_form(seed):
    module = Exponent()
    x = torch.randn(5, 3, requires_grad=True)
    h = x * 1.0
    for options in ({}, {"inverse": module.inverse}, {"inverse": module.inverse, "keep": (h,)}, {"enabled": False}):
        y = recollect.checkpoint(module.function, x * 1.0, seed=seed, **options)
        (found,) = torch.autograd.grad(y.sin().sum(), x)
        assert torch.allclose(found, (x * module.w).cos() * module.w)


def test_nothing_is_printed_by_the_library(capsys):
    Exponent().check(torch.randn(5, 3))
    assert capsys.readouterr() == ("", "")
