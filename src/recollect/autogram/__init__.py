"""The Gramian of the Jacobian of many losses, layer by layer, without the Jacobian.

After Algorithm 3 of "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232). In the forward pass a node
is put behind each layer that has a *rule*; it keeps the layer's inputs where autograd keeps what it saves. For a
Gramian, one backward pass goes down to these nodes and computes gradients of inputs only. Where a layer's gradient
comes by, its rule gives the layer's Jacobian as a *factor*, which is squared and forgotten.

Which losses one backward pass stands for follows from the graph's operations: those along an axis that all of them keep
apart, as the elements of a batch are; never from values. Where they are not apart, parameters go by rows, with a pass
for each loss. Gramians are certified when they are used, and now and then otherwise: wᵀ G w = ‖Jᵀ w‖², the squared
norm of the gradient that they weigh.

Where the whole Gramian is not needed, ``Engine.compute_norms`` gives its diagonal alone, from the same passes; and for
two lists of losses ``Engine.compute_gramian`` gives the products of their gradients.

What no rule accounts for, parameters used by functions, by a parent, in modules of no known type, is found in the graph
and taken from there, exactly: nothing is run twice. A parameter that is used several times has its cross terms.
"""

from recollect.autogram._certificate import Certificate, GramianError
from recollect.autogram._engine import Engine, register_rule
from recollect.autogram._factors import Blocks, Factor, NotCovered, Outer, Picked, Rows
from recollect.autogram._registry import Rule, Sharing
from recollect.autogram._uses import NoiseScale, clip_weights, gradient_noise_scale

__all__ = [
    "Blocks",
    "Certificate",
    "Engine",
    "Factor",
    "GramianError",
    "NoiseScale",
    "NotCovered",
    "Outer",
    "Picked",
    "Rows",
    "Rule",
    "Sharing",
    "clip_weights",
    "gradient_noise_scale",
    "register_rule",
]
