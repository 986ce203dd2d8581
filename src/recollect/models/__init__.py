"""What users train.

:class:`RevGNN` is the deep reversible network of "Training Graph Neural Networks with 1000 Layers" (arXiv 2106.07476).
The others train on mini-batches with histories, as :class:`~recollect.autoscale.ScalableGNN` says: the networks of
"GNNAutoScale: Scalable and Expressive Graph Neural Networks via Historical Embeddings" (arXiv 2106.05609).
"""

from recollect.models._appnp import APPNP
from recollect.models._gat import GAT
from recollect.models._gcn import GCN
from recollect.models._gcn2 import GCN2
from recollect.models._gin import GIN
from recollect.models._pna import PNA, PNA_JK
from recollect.models._pygas import PygasReport, load_pygas_state_dict
from recollect.models._revgnn import RevGNN

__all__ = [
    "APPNP",
    "GAT",
    "GCN",
    "GCN2",
    "GIN",
    "PNA",
    "PNA_JK",
    "PygasReport",
    "RevGNN",
    "load_pygas_state_dict",
]
