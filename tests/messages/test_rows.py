"""What goes row by row: what torch's modules are known for holds, and nothing else is known."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

from recollect._torch import has_global_hooks
from recollect.autogram import Engine
from recollect.messages.rows import _ELEMENTWISE, by_structure, goes_by_rows, some_rows


class Own(nn.LayerNorm):
    pass


def with_(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module, hook):
    getattr(module, hook)(lambda *args: None)
    return module


KNOWN = {kind.__name__: kind for kind in _ELEMENTWISE} | {
    "linear": lambda: nn.Linear(6, 3),
    "layer": lambda: nn.LayerNorm(6),
    "rms": lambda: nn.RMSNorm(6),
    "batch, evaluated": lambda: nn.BatchNorm1d(6).eval(),
    "several": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Sequential(nn.LayerNorm(6))),
}
UNKNOWN = {
    "batch": lambda: nn.BatchNorm1d(6),
    "batch without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(),
    "over rows": lambda: nn.LayerNorm((24, 6)),
    "a subclass": lambda: Own(6),
    "softmax over rows": lambda: nn.Softmax(0),
    "a function": lambda: torch.relu,
    "another forward": lambda: with_(nn.ReLU(), forward=lambda x: x - x.mean(0)),
    "another one inside": lambda: nn.Sequential(nn.ReLU(), with_(nn.Linear(6, 6), forward=lambda x: x.cumsum(0))),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    **{
        hook: lambda hook=hook: hooked(nn.Linear(6, 6), hook)
        for hook in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_so(name):
    module, x = KNOWN[name](), torch.randn(24, 6)
    assert by_structure(module)
    assert goes_by_rows(module, x, module=module)
    module.eval()
    assert by_structure(module)
    assert_close(module(x), torch.cat([module(row) for row in x.split(1)]))


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_else_is_known(name):
    assert not by_structure(UNKNOWN[name]())


def test_a_class_whose_forward_was_replaced_and_hooks_of_all_modules(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda self, x: x - x.mean(0))
        assert not by_structure(nn.ReLU())
    handle = register_module_forward_hook(lambda module, args, out: out)
    assert not by_structure(nn.ReLU())
    handle.remove()
    assert by_structure(nn.ReLU())
    engine = Engine(nn.Linear(2, 2))  # sees what modules return, and changes no number
    assert has_global_hooks()
    assert by_structure(nn.ReLU())
    del engine


def test_few_rows_are_looked_at():
    seen = []

    def run(x):
        seen.append(x.size(0))
        return x - x.mean(0)

    assert not goes_by_rows(run, some_rows(torch.randn(1000, 6)), module=nn.Identity())
    assert seen == [24, 7]
