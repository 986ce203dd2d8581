"""State dicts of PyGAS's models, with the names and shapes that its public source and torch_geometric's give them."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from model_zoo import IN, OUT, data_for, given, make
from torch import Tensor

from recollect.models import APPNP, GAT, GCN, GCN2, PNA, PNA_JK, load_pygas_state_dict

BN = {"weight": (6,), "bias": (6,), "running_mean": (6,), "running_var": (6,), "num_batches_tracked": ()}


def linear(name: str, channels_in: int, channels_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels_out, channels_in), f"{name}.bias": (channels_out,)}


def norms(number: int, prefix: str = "bns") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{k}.{name}": shape for k in range(number) for name, shape in BN.items()}


def gcn(weight: str) -> dict[str, tuple[int, ...]]:
    widths = [IN, 6, 6, OUT]
    shapes: dict = {}
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"convs.{k}.bias": (b,), f"convs.{k}.{weight}": (a, b) if weight == "weight" else (b, a)}
    return shapes | norms(3)


def gat(weights: list[str], att: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (a, heads, each) in enumerate([(IN, 2, 6), (12, 2, 6), (12, 3, OUT)]):
        shapes[f"convs.{k}.bias"] = (each,) if k == 2 else (heads * each,)
        shapes |= {f"convs.{k}.{name}": (1, heads, each) for name in att}
        shapes |= {f"convs.{k}.{name}.weight": (heads * each, a) for name in weights}
    return shapes


def pna(widths: list[int], pairs: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        shapes |= linear(f"convs.{k}.lin", a, b)
        for pair in range(pairs):
            shapes |= linear(f"convs.{k}.pre_lins.{pair}", a, b) | linear(f"convs.{k}.post_lins.{pair}", b, b)
    return shapes


def jumping(batch_norm: bool) -> dict[str, tuple[int, ...]]:
    norm = {f"lins.0.1.{name}": shape for name, shape in BN.items()} if batch_norm else {}
    return linear("lins.0.0", IN, 6) | norm | linear("lins.1", 24, OUT)


HEAD = linear("lins.0", IN, 6) | linear("lins.1", 6, OUT)
CASES = {
    "gcn, 1.7": ("gcn", {}, gcn("weight"), 0),
    "gcn, 2": ("gcn", {}, gcn("lin.weight"), 3),
    "gat, 1.7": ("gat", {}, gat(["lin_l", "lin_r"], ["att_l", "att_r"]), 0),
    "gat, 2.0": ("gat", {}, gat(["lin_src", "lin_dst"], ["att_src", "att_dst"]), 0),
    "gat, 2.5": ("gat", {}, gat(["lin"], ["att_src", "att_dst"]), 0),
    "gcn2": ("gcn2", {}, HEAD | {f"convs.{k}.weight1": (6, 6) for k in range(3)} | norms(3), 0),
    "gcn2, two weights": (
        "gcn2-all",
        {},
        HEAD | {f"convs.{k}.weight{n}": (6, 6) for k in range(3) for n in (1, 2)} | norms(3),
        0,
    ),
    "appnp": ("appnp", {}, linear("lins.0", IN, 6) | linear("lins.1", 6, OUT), 0),
    "pna": ("pna-scalers", {}, pna([IN, 6, 6, OUT], 5) | norms(2), 0),
    "pna_jk": ("pna-jk", {}, pna([6, 6, 6, 6], 2) | norms(3) | jumping(False), 0),
    "pna_jk, norms": ("pna-jk-all", {"edge_dim": None}, pna([6, 6, 6, 6], 1) | norms(3) | jumping(True), 0),
}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    found = {name: torch.rand(shape, dtype=torch.float64) + 0.1 for name, shape in shapes.items()}
    for name in found:  # one parameter under two names
        for tied, as_well in (("lin_r.", "lin_l."), ("lin_dst.", "lin_src.")):
            if tied in name:
                found[name] = found[name.replace(tied, as_well)]
    return {name: value.long() * 0 if "num_batches" in name else value for name, value in found.items()}


@pytest.mark.parametrize("case", list(CASES))
def test_a_state_dict_of_every_model(case):
    name, options, shapes, transposed = CASES[case]
    model, state = make(name, **options), drawn(shapes)
    report = load_pygas_state_dict(model, state)
    own = model.state_dict()
    assert len(report.transposed) == transposed
    assert all(key.startswith("bns.") for key in report.unused)
    for key, value in state.items():
        if key not in report.unused:
            mine = own[report.renamed.get(key, key)]
            assert torch.equal(mine, value.t() if key in report.transposed else value)
    assert {report.renamed.get(key, key) for key in state} - set(report.unused) == set(own)
    data = data_for(model)
    assert model.eval()(data.x, data.adj_t, **given(model, data)).isfinite().all()


def test_what_does_not_fit_is_named_and_nothing_is_written():
    model = make("gat")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = drawn(CASES["gat, 1.7"][2])
    for change, message in (
        ({"convs.0.lin_r.weight": torch.zeros(12, IN).double()}, "convs.0.lin_r.weight differs from another entry"),
        ({"convs.1.att_l": torch.zeros(1, 3, 6)}, r"convs.1.att_l has shape \[1, 3, 6\], but \[1, 2, 6\] is expected"),
        ({"lins.0.weight": torch.zeros(2, 2)}, "lins.0.weight is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pygas_state_dict(model, good | change)
    del good["convs.2.bias"]
    with pytest.raises(ValueError, match=r"does not fit a GAT with these numbers: convs\.2\.bias is missing"):
        load_pygas_state_dict(model, good)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_norms_that_were_applied_need_a_model_with_norms():
    state = drawn(CASES["gcn, 1.7"][2])
    state["bns.1.num_batches_tracked"] += 7
    with pytest.raises(ValueError, match=r"bns\.1\.weight is a norm that was applied: the model needs batch_norm=True"):
        load_pygas_state_dict(make("gcn"), state)
    load_pygas_state_dict(make("gcn-bare-all"), state)


COMMON = "num_nodes in_channels hidden_channels out_channels num_layers"
OPTIONS = "dropout drop_input batch_norm residual"
MOVED = "pool_size buffer_size device"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (GCN, f"{COMMON} {OPTIONS} linear {MOVED}"),
        (GAT, f"num_nodes in_channels hidden_channels hidden_heads out_channels out_heads num_layers dropout {MOVED}"),
        (APPNP, f"{COMMON} alpha dropout {MOVED}"),
        (GCN2, f"{COMMON} alpha theta shared_weights {OPTIONS} {MOVED}"),
        (PNA, f"{COMMON} aggregators scalers deg {OPTIONS} {MOVED}"),
    ],
)
def test_the_order_of_arguments_is_pygas(model, expected):
    parameters = list(inspect.signature(model).parameters.values())
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == expected.split()


def test_arguments_by_position():
    model = GAT(10, 4, 2, 3, 5, 2, 4, 0.1, None, None, "cpu")
    assert [conv.heads for conv in (model.convs[0], model.convs[-1])] == [3, 2]
    assert (model.num_layers, model.dropout) == (4, 0.1)
    with pytest.raises(TypeError, match="GAT needs out_channels"):
        GAT(10, 4, 2)
    deg = torch.ones(10)
    assert PNA_JK(10, 4, 6, 3, 2, ["mean"], ["identity"], deg, 0.1, True, True, True, None, None, "cpu").residual


def test_the_name_of_pygas_module():
    from recollect import models
    from recollect.autoscale import ScalableGNN
    from recollect.autoscale import models as alias

    assert alias.ScalableGNN is ScalableGNN
    assert all(
        getattr(alias, name) is getattr(models, name) for name in ("GCN", "GAT", "APPNP", "GCN2", "PNA", "PNA_JK")
    )
