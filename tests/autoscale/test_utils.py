import pytest
import torch
from graph_zoo import every_graph, ring
from sklearn.metrics import f1_score

from recollect.autoscale import compute_micro_f1, dropout, gen_masks, to_adj_t


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labels", ["one", "many", "many, as booleans"])
def test_micro_f1_is_that_of_scikit_learn(labels, masked):
    torch.manual_seed(0)
    logits = torch.randn(50, 4)
    mask = torch.rand(50) < 0.5 if masked else None
    rows = mask if masked else slice(None)
    if labels == "one":
        y = torch.randint(4, (50,))
        wanted = f1_score(y[rows], logits.argmax(1)[rows], average="micro")
    else:
        y = (torch.rand(50, 4) < 0.3).to(torch.bool if "booleans" in labels else torch.float32)
        wanted = f1_score(y[rows] > 0.5, logits[rows] > 0, average="micro")
    assert compute_micro_f1(logits, y, mask) == pytest.approx(wanted)


@pytest.mark.parametrize("y", [torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(4, 3)], ids=str)
def test_micro_f1_of_nothing_is_zero(y):
    assert compute_micro_f1(-torch.ones(y.size(0), 3), y) == 0


def test_splits_have_so_many_of_each_class():
    y = torch.tensor([0] * 10 + [1] * 4 + [2] * 7 + [-1] * 3)[torch.randperm(24)]
    train, val, test = gen_masks(y, train_per_class=3, val_per_class=2, num_splits=5)
    assert train.shape == val.shape == test.shape == (24, 5)
    assert torch.equal((train.int() + val.int() + test.int())[:, 0], (y >= 0).int())
    for split in range(5):
        for label, counts in {0: (3, 2, 5), 1: (3, 1, 0), 2: (3, 2, 2), -1: (0, 0, 0)}.items():
            assert tuple(int(mask[y == label, split].sum()) for mask in (train, val, test)) == counts


def test_splits_differ_and_follow_the_generator():
    y = torch.arange(60) % 3
    one, other = (gen_masks(y, 5, 5, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[0][:, 0], one[0][:, 1])


def test_every_node_is_drawn_as_often():
    train, _, _ = gen_masks(torch.arange(8) % 2, 1, 1, 4000, torch.Generator().manual_seed(0))
    assert (train.float().mean(dim=1) - 0.25).abs().max() < 0.03  # four standard deviations


@every_graph
def test_dropped_edges_are_zero_and_others_grow(make):
    adj_t = to_adj_t(make()).adj_t
    torch.manual_seed(0)
    dropped = dropout(adj_t, 0.5)
    assert torch.equal(dropped.col_indices(), adj_t.col_indices())
    kept = dropped.values() != 0
    torch.testing.assert_close(dropped.values()[kept], 2 * adj_t.values()[kept])
    assert adj_t.values().numel() < 10 or 0 < int(kept.sum()) < kept.numel()
    assert dropout(adj_t, 0.5, training=False) is adj_t
    assert dropout(adj_t, 0.0) is adj_t


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compute_micro_f1(torch.ones(3, 2), torch.ones(4)), ValueError, r"\(3, 2\) and y \(4,\)"),
        (lambda: compute_micro_f1(torch.ones(3, 2), torch.ones(3), torch.ones(3)), ValueError, "must be bool"),
        (lambda: gen_masks(torch.ones(3, 2, dtype=torch.int64)), ValueError, "must hold integer classes"),
        (lambda: gen_masks(torch.ones(3)), ValueError, "torch.float32"),
        (lambda: gen_masks(torch.arange(3), num_splits=0), ValueError, "num_splits 0"),
        (lambda: gen_masks(torch.arange(3), -1), ValueError, "train_per_class is -1"),
        (lambda: dropout(to_adj_t(ring()).adj_t, 1.5), ValueError, "p is 1.5"),
        (lambda: dropout(torch.eye(3), 0.5), TypeError, "must be a torch.sparse_csr tensor"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
