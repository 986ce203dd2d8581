"""What users train.

:class:`RevGNN` is the deep reversible network of "Training Graph Neural Networks with 1000 Layers" (arXiv 2106.07476).
"""

from recollect.models._revgnn import RevGNN

__all__ = ["RevGNN"]
