"""What is in host memory stays as it is; tests/device has the way from a device and back."""

import torch

from recollect._transfer import sent
from recollect.aggregation import UPGradWeighting
from recollect.aggregation._host import fetched


def test_what_is_in_host_memory_is_not_copied():
    values = [torch.eye(2), None, torch.tensor(3), "text"]
    assert all(found is value for found, value in zip(fetched(values), values, strict=True))
    assert sent(values[0], torch.device("cpu")) is values[0]


def test_settings_follow_no_module():
    """Moved and cast with a model, a weighting computes with the vector that it was given."""
    weighting = UPGradWeighting(torch.tensor([1.0, 1e-3]))
    expected = weighting(torch.eye(2))
    assert torch.nn.ModuleList([weighting]).half()[0](torch.eye(2)).equal(expected)
    assert weighting.pref_vector.dtype == torch.float32
