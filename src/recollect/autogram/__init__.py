"""The Gramian of the Jacobian of many losses, layer by layer, without the Jacobian.

After Algorithm 3 of "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232). In the forward pass a node
is put behind each layer that has a *rule*; it keeps the layer's inputs where autograd keeps what it saves. For a
Gramian, one backward pass goes down to these nodes and computes gradients of inputs only. Where a layer's gradient
comes by, its rule gives the layer's Jacobian as a *factor*, which is squared and forgotten.

================ ================================================== =======================================
``batch_dim``    backward passes                                    what it asks for
================ ================================================== =======================================
a dimension      one for all elements of the batch                  elements that do not depend on others
None             one for each loss, or all at once                  nothing
================ ================================================== =======================================

What no rule accounts for, parameters used by functions, by a parent, in modules of no known type, is found in the graph
and taken from there, exactly: nothing is run twice. A parameter that is used several times has its cross terms.
"""

from recollect.autogram._engine import Engine, register_rule
from recollect.autogram._factors import Blocks, Factor, NotCovered, Outer, Picked, Rows

__all__ = ["Blocks", "Engine", "Factor", "NotCovered", "Outer", "Picked", "Rows", "register_rule"]
