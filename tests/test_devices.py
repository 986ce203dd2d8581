"""The table of forms: what each kind of device gets, and that every form gives the same results."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import recollect
from recollect._devices import FORMS, OTHERS, Forms, forms_of
from recollect.frames._bits import bits_of
from recollect.frames._fingerprint import fingerprint
from recollect.messages import extreme, propagate, row_pointers, sparse_csr


def test_a_kind_of_device_has_one_entry():
    assert forms_of(torch.device("cuda", 1)) is forms_of(torch.device("cuda")) is FORMS["cuda"]
    assert forms_of(torch.device("cpu")) is FORMS["cpu"]
    assert forms_of(torch.device("meta")) is forms_of(torch.device("xpu")) is OTHERS


def test_nothing_but_the_cpu_is_read_at_once():
    assert {kind for kind, forms in FORMS.items() if forms.reads_at_once} == {"cpu"}
    assert not OTHERS.reads_at_once


def graph():
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(30, 40, generator=generator) < 0.2) * torch.rand(30, 40, generator=generator)
    return dense.double(), torch.randn(40, 70, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("form", ["reductions", "sampled_products", "wide_blocks"])
def test_products_are_the_same_in_either_form(monkeypatch, form):
    dense, x = graph()
    grad = torch.randn(30, 70, dtype=torch.float64)
    rows, columns = dense.nonzero().unbind(1)
    weights, rowptr = dense[rows, columns], row_pointers(rows, 30, torch.int64)
    for value in (False, True):
        monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], **{"sampled_products": False, form: value}))
        adj_t, leaves = (
            sparse_csr(rowptr, columns, weights, (30, 40)),
            [x.clone().requires_grad_(), weights.clone().requires_grad_()],
        )
        out = propagate(adj_t, *leaves)
        torch.testing.assert_close(out, dense @ x)
        of_x, of_weights = torch.autograd.grad(out, leaves, grad)
        torch.testing.assert_close(of_x, dense.T @ grad)
        torch.testing.assert_close(of_weights, (grad[rows] * x[columns]).sum(1))


def test_reductions_are_refused_where_torch_has_none(monkeypatch):
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], reductions=False))
    adj_t = sparse_csr(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
    with pytest.raises(ValueError, match="x is on cpu, but torch has this reduction on the CPU only"):
        extreme(adj_t, torch.ones(1, 2), "max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True], ids=["whole", "with gaps"])
def test_fingerprints_are_the_same_in_every_form(monkeypatch, dtype, strided):
    x = torch.randn(300, 250, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x[:, ::2] if strided else x
    expected, bits = fingerprint(x), bits_of(x)
    for name in ("double_sums", "dot_norms"):
        monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], piece=1000, **{name: False}))
        found = fingerprint(x)
        assert found.projections == pytest.approx(expected.projections, rel=1e-3, abs=1e-2)
        assert bits_of(x) == bits


def test_late_numbers_are_those_that_are_read_at_once(monkeypatch):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    expected = fingerprint(x)
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], reads_at_once=False))
    found = fingerprint(x)
    assert isinstance(found.projections, torch.Tensor)
    assert found.projections.tolist() == pytest.approx(expected.projections)


def test_every_form_is_told():
    text = Forms.__doc__
    assert [field.name for field in fields(Forms) if f"        {field.name}: " not in text] == []


ASKS = re.compile(r"\bis_cpu\b|\bis_cuda\b|\bdevice\.type (==|!=|in|not in) (?!\"meta\")|\bkind == \"cpu\"")
# Who else asks for the kind of a device, and for what: where something is, and not how it is computed there.
ELSEWHERE = {
    "_transfer": "to the host a copy waits", "memory": "who measures", "aggregation/_host": "what comes",
    "aggregation/_settings": "what is sent", "autoscale/histories/_queues": "tables on the host",
    "autoscale/histories/_memory": "what is pinned",
    "budget/_bytes": "who measures", "budget/_cost": "who measures", "budget/_planning": "where activations are",
    "frames/_drift": "what is sent", "frames/_eager": "names", "frames/_fingerprint": "a short way of the CPU's form",
    "autogram/_hidden": "which thread a pass runs in",
    "frames/_frame": "whose generators", "frames/_random": "whose generators", "frames/_record": "what torch compares",
    "frames/sources/_host_store": "what is copied",
    "messages/_convolutions": "graph capture", "outofcore/_crossing": "what is sent", "outofcore/_step": "generators",
    "outofcore/_whole_graph": "ranks",
}  # fmt: skip


def test_forms_are_chosen_in_the_table():
    source = Path(recollect.__file__).parent
    found = {
        str(path.relative_to(source).with_suffix(""))
        for path in source.rglob("*.py")
        if path.relative_to(source).parts[0] != "train" and ASKS.search(path.read_text())
    }
    assert found == ELSEWHERE.keys()
