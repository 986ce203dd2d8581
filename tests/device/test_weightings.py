"""Weightings wait for the device once a call, and give the weights that they give on the CPU, where the Gramian is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import recollect.aggregation
from device.emulation import watch
from recollect.aggregation import (
    CRMOGM,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    Flattening,
    GaussNewton,
    GradVac,
    Krum,
    Mean,
    MoDo,
    NashMTL,
    PCGrad,
    Random,
    ResidualWeighting,
    SDMGrad,
    StatefulWeighting,
    Sum,
    UPGrad,
    Weighting,
    _gradvac,
    _pcgrad,
    conflict,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# For m objectives; what is a tensor is on the device as far as it may be.
MAKERS: dict[str, Callable[[int, str], Any]] = {
    "UPGrad": lambda m, device: UPGrad(),
    "UPGrad, preference": lambda m, device: UPGrad(torch.arange(1.0, m + 1, device=device)),
    "DualProj": lambda m, device: DualProj(torch.arange(1.0, m + 1, device=device), reg_eps=0.0),
    "MGDA": lambda m, device: MGDA(),
    "PCGrad": lambda m, device: PCGrad(seeded()),
    "IMTLG": lambda m, device: IMTLG(),
    "CAGrad": lambda m, device: CAGrad(0.5),
    "AlignedMTL": lambda m, device: AlignedMTL(torch.arange(1.0, m + 1, device=device), "median"),
    "NashMTL": lambda m, device: NashMTL(),
    "FairGrad": lambda m, device: FairGrad(2.0),
    "ConFIG": lambda m, device: ConFIG(torch.arange(1.0, m + 1, device=device)),
    "GradVac": lambda m, device: GradVac(generator=seeded()),
    "MoDo": lambda m, device: MoDo(),
    "SDMGrad": lambda m, device: SDMGrad(pref_vector=torch.arange(1.0, m + 1, device=device)),
    "CRMOGM": lambda m, device: CRMOGM(GradVac(generator=seeded()), initial_weights=torch.ones(m, device=device)),
    "CRMOGM, a function": lambda m, device: CRMOGM(lambda gramian: gramian.diagonal()),
    "Krum": lambda m, device: Krum(0),
    "Mean": lambda m, device: Mean(),
    "Sum": lambda m, device: Sum(),
    "Constant": lambda m, device: Constant(torch.arange(1.0, m + 1, device=device)),
    "Random": lambda m, device: Random(seeded()),
    "GaussNewton": lambda m, device: GaussNewton(1e-3, momentum=0.5),
    "GaussNewton, undamped": lambda m, device: GaussNewton(0.0, momentum=0.5),
    "Flattening": lambda m, device: Flattening(UPGrad(torch.arange(1.0, m + 1, device=device))),
    "Flattening, a memory": lambda m, device: Flattening(CRMOGM(MoDo())),
    "Flattening, residuals": lambda m, device: Flattening(GaussNewton(1e-3, momentum=0.5)),
    "Flattening, a function": lambda m, device: Flattening(lambda gramian: gramian.diagonal()),
}
NAMES = list(MAKERS)
BASES = {Weighting, StatefulWeighting, ResidualWeighting}
KINDS: dict[str, Callable[[int], Tensor]] = {
    "independent": lambda m: normal(m, 3 * m),
    "conflicting": lambda m: normal(m, 2 * m) + normal(m, 1, seed=1).sign() * normal(1, 2 * m, seed=2),
    "dependent": lambda m: normal(m, max(m // 2, 1)),
    "with a zero": lambda m: normal(m, m) * (torch.arange(m) > 0)[:, None],
    "equal in pairs": lambda m: normal(m, m)[torch.arange(m) // 2],
}


def given(name: str, jacobian: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what the weighting takes, on the CPU."""
    vectors = [normal(len(jacobian), seed=seed).to(dtype) for seed in (3, 4)] if "residuals" in name else []
    if name.startswith("GaussNewton"):
        vectors = [normal(len(jacobian), seed=seed) for seed in (3, 4)]
    return [(jacobian @ jacobian.T).to(dtype), *vectors]


def moved(values: list[Tensor], device: str) -> list[Tensor]:
    return [value.to(device) for value in values]


def assert_one_wait(make: Callable[[], Tensor], expected: Tensor, device: str) -> None:
    with watch() as log:
        weights = make()
    assert log.syncs <= 1, f"{log.syncs} waits: {log.where}"
    assert weights.device.type == torch.device(device).type
    assert weights.dtype == expected.dtype
    torch.testing.assert_close(weights.cpu(), expected, rtol=0, atol=0)


def test_every_weighting_is_in_the_table():
    public = {getattr(recollect.aggregation, name) for name in recollect.aggregation.__all__}
    weightings = {value for value in public if isinstance(value, type) and issubclass(value, torch.nn.Module)} - BASES
    assert {type(make(3, "cpu")) for make in MAKERS.values()} == weightings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_waits_once(name, m, dtype, other):
    if name == "Krum" and m < 3:
        pytest.skip("Krum needs three gradients at least")
    for kind in KINDS.values():
        here, there = MAKERS[name](m, "cpu"), MAKERS[name](m, other)
        values = given(name, kind(m), dtype)
        for _ in range(3):  # those that remember something too
            expected, on_device = here(*values), moved(values, other)
            assert_one_wait(lambda w=there, v=on_device: w(*v), expected, other)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_may_be_on_the_device(name, other):
    """After a move or a checkpoint of the device, it comes back in the copy with the Gramian."""
    here, there = MAKERS[name](5, "cpu"), MAKERS[name](5, other)
    values = given(name, normal(5, 9), torch.float32)
    here(*values)
    there(*values)
    there.to(other)
    expected, on_device = here(*values), moved(values, other)
    assert_one_wait(lambda: there(*on_device), expected, other)
    there.load_state_dict({key: value.to(other) for key, value in here.state_dict().items()})
    expected = here(*values)
    assert_one_wait(lambda: there(*on_device), expected, other)


class Sending(TorchDispatchMode):
    """Notes copies to a device that block: of memory that is not pinned, they wait for the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and found.device.type == self.device != args[0].device.type:
            self.blocking.extend([] if kwargs.get("non_blocking") else [func.__name__])
        return found


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_sent_without_a_wait(name, other):
    weighting = MAKERS[name](5, other)
    on_device = moved(given(name, normal(5, 9), torch.float32), other)
    with Sending(other) as sending:
        weighting(*on_device)
    assert not sending.blocking
    with Sending(other) as sending:
        torch.ones(3).to(other)
    assert sending.blocking  # that is how it would be noticed


@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_does_not_matter(name, other):
    values = given(name, normal(5, 9), torch.float32)
    expected, on_device = MAKERS[name](5, "cpu")(*values), moved(values, other)
    weighting = MAKERS[name](5, other)
    with torch.device(other):
        assert_one_wait(lambda: weighting(*on_device), expected, other)


@pytest.mark.parametrize("beside", ["cpu", "other"])
def test_what_comes_beside_the_gramian_may_be_elsewhere(beside, other):
    """One device, one wait, whichever of both it is."""
    gramian, *vectors = given("GaussNewton", normal(5, 9), torch.float32)
    expected = GaussNewton(1e-3, momentum=0.5)(gramian, *vectors)
    place = other if beside == "cpu" else "cpu"
    pairs = moved([torch.stack([vector, vector], 1) for vector in vectors], beside)
    gramian, vectors = gramian.to(place), [pair[:, 1] for pair in pairs]  # strides do not matter
    assert_one_wait(lambda: GaussNewton(1e-3, momentum=0.5)(gramian, *vectors), expected, place)


@pytest.mark.parametrize("module", [_pcgrad, _gradvac])
def test_orders_that_are_drawn_on_the_device(module, other, monkeypatch):
    """The device has no generator: orders of the CPU, sent there, stand for its own."""
    name = {_pcgrad: "PCGrad", _gradvac: "GradVac"}[module]
    here, there, draw = MAKERS[name](5, "cpu"), MAKERS[name](5, other), module.random_orders
    gramian = KINDS["conflicting"](5) @ KINDS["conflicting"](5).T
    expected = [here(gramian) for _ in range(3)]
    on_device = gramian.to(other)
    monkeypatch.setattr(module, "random_orders", lambda *args, **options: draw(*args, **options).to(other))
    for weights in expected:
        assert_one_wait(lambda: there(on_device), weights, other)


def test_losses_of_any_shape(other):
    rows = normal(6, 9)
    gramian = (rows @ rows.T).reshape(2, 3, 2, 3).transpose(2, 3)
    expected, on_device = Flattening(UPGrad())(gramian), gramian.to(other)
    assert_one_wait(lambda: Flattening(UPGrad())(on_device), expected, other)


def test_ones_own_method_gets_the_gramian_and_its_buffers_in_host_memory(other):
    class Own(Weighting):
        def __init__(self):
            super().__init__()
            self.register_buffer("factors", torch.arange(1.0, 4.0))
            self.register_buffer("offsets", torch.ones(3, dtype=torch.bfloat16))

        def weigh(self, gramian):
            return gramian @ self.factors + self.offsets

    gramian = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    own, on_device = Own().to(other), gramian.to(other)
    assert_one_wait(lambda: own(on_device), torch.tensor([2.0, 5.0, 10.0]), other)


def test_weights_that_are_on_the_device_stay_there(other):
    class Own(Weighting):
        def weigh(self, gramian):
            return torch.ones(len(gramian), device=other)

    on_device = torch.eye(3, device=other)
    assert_one_wait(lambda: Own()(on_device), torch.ones(3), other)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 2.0, 3.0, 1.0])])
def test_conflict_waits_once(weights, other):
    gramian = KINDS["conflicting"](5)
    gramian = gramian @ gramian.T
    expected = conflict(gramian, weights)
    on_device = [gramian.to(other), None if weights is None else weights.to(other)]
    with watch() as log:
        found = conflict(*on_device)
        measures = found.cosines.tolist()
    assert log.syncs <= 1, f"{log.syncs} waits: {log.where}"
    assert measures == expected.cosines.tolist()
    assert (found.negative_share, found.min_cosine) == (expected.negative_share, expected.min_cosine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.index_fill(0, torch.tensor([1]), torch.nan), "look at the losses and gradients of objective 1"),
        (lambda g: g.triu(), "a Gramian is symmetric"),
        (lambda g: -g, "it is negative at objectives 0, 1, 2"),
    ],
)
def test_what_is_refused_is_refused_with_the_same_words(change, message, other):
    rows = normal(3, 5)
    gramian = change(rows @ rows.T)
    with pytest.raises(ValueError, match=message) as on_cpu:
        UPGrad()(gramian)
    for takes in (UPGrad(), CRMOGM(UPGrad()), Flattening(UPGrad()), conflict, lambda g: GaussNewton(1.0)(g, g[0])):
        with watch() as log, pytest.raises(ValueError, match=message) as on_device:
            takes(gramian.to(other))
        assert str(on_device.value) == str(on_cpu.value)
        assert log.syncs <= 1, log.where
