"""The rules: for each type of layer, its Jacobian as a pure function of its inputs and its output's gradients.

A rule knows nothing of hooks, engines or graphs; :class:`recollect.autogram.Rule` says what it gets and gives.
It says what the Jacobian is in the form that is cheapest to hold, and how that becomes a Gramian is not its business:

- linear, bilinear and recurrent layers, and convolutions of few positions: outer products of inputs and gradients;
- other convolutions: pieces, each formed from what the kernel sees, a few rows at a time;
- embeddings: the entries that were looked up;
- norms, slopes and biases: rows, which are small.

What a rule needs from inside a layer it computes again from the layer's inputs (what was normalised, the states of a
recurrent layer), without randomness and side effects. It declines what it cannot say exactly: then, as for layers that
have no rule, the rows come from the graph itself. ``MultiheadAttention`` needs none for that reason: its projections
are matrix products in the graph, where inputs and gradients are at hand, dropout included.

A new rule is one function, one line in the table, and a test against autograd (``tests/autogram/rules``).
"""

from __future__ import annotations

from torch import nn

from recollect.autogram._registry import Entry
from recollect.autogram.rules._bilinear import bilinear
from recollect.autogram.rules._conv import conv
from recollect.autogram.rules._embedding import embedding, embedding_bag, embedding_bag_sharing
from recollect.autogram.rules._linear import linear
from recollect.autogram.rules._norm import (
    batch_norm,
    batch_norm_sharing,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from recollect.autogram.rules._recurrent import keeps_output, recurrent, recurrent_cell, recurrent_sharing
from recollect.autogram.rules._scale import prelu, prelu_sharing
from recollect.autogram.rules._view import along_batch, along_positions

__all__ = ["RULES"]

# Of a linear layer, autograd keeps the input for the weight alone; of convolutions and norms it does so in any case.
_BIAS = frozenset({"bias"})


def _normalised(layer: nn.LayerNorm | nn.RMSNorm) -> int:
    return len(layer.normalized_shape)


RULES: dict[type[nn.Module] | str, Entry] = {
    nn.Linear: Entry(linear, along_positions(), constant=_BIAS),
    "torch_geometric.nn.dense.linear.Linear": Entry(linear, along_positions(), constant=_BIAS),
    nn.Bilinear: Entry(bilinear, along_positions()),
    nn.Conv1d: Entry(conv, along_batch(3)),
    nn.Conv2d: Entry(conv, along_batch(4)),
    nn.Conv3d: Entry(conv, along_batch(5)),
    nn.ConvTranspose1d: Entry(conv, along_batch(3)),
    nn.ConvTranspose2d: Entry(conv, along_batch(4)),
    nn.ConvTranspose3d: Entry(conv, along_batch(5)),
    nn.LayerNorm: Entry(layer_norm, along_positions(_normalised)),
    nn.RMSNorm: Entry(rms_norm, along_positions(_normalised)),
    nn.GroupNorm: Entry(group_norm, along_batch()),
    nn.InstanceNorm1d: Entry(instance_norm(1), along_batch(3)),
    nn.InstanceNorm2d: Entry(instance_norm(2), along_batch(4)),
    nn.InstanceNorm3d: Entry(instance_norm(3), along_batch(5)),
    nn.BatchNorm1d: Entry(batch_norm, batch_norm_sharing),
    nn.BatchNorm2d: Entry(batch_norm, batch_norm_sharing),
    nn.BatchNorm3d: Entry(batch_norm, batch_norm_sharing),
    nn.SyncBatchNorm: Entry(batch_norm, batch_norm_sharing),
    nn.PReLU: Entry(prelu, prelu_sharing),
    nn.Embedding: Entry(embedding, along_positions(lambda layer: 0)),
    nn.EmbeddingBag: Entry(embedding_bag, embedding_bag_sharing),
    nn.RNN: Entry(recurrent, recurrent_sharing),
    nn.LSTM: Entry(recurrent, recurrent_sharing, has_output=keeps_output),
    nn.GRU: Entry(recurrent, recurrent_sharing),
    nn.RNNCell: Entry(recurrent_cell, along_batch(2)),
    nn.LSTMCell: Entry(recurrent_cell, along_batch(2)),
    nn.GRUCell: Entry(recurrent_cell, along_batch(2)),
}
