"""Training steps over a whole graph that does not fit in memory: exact, part by part, with one loss or several.

A grouped reversible network needs its last output alone to go backward. Here that output, its gradient, and nothing
else, lie in tables, in host memory or in files, and one part of the graph with its neighbours is computed at a time.
For groups X_1..X_C of layer l, with X'_0 = X_2 + ... + X_C (Li et al. 2021, arXiv 2106.07476, equations 3 and 4)::

    forward    for each group i, for each part p:  X_i[p] += q(f_i(S_p, X_(i-1)[p and halo]))
    backward   for each group i, from the last, for each part p:
               y = f_i(S_p, z),  z = X_(i-1)[p and halo];     X_i[p] -= q(y)
               G_(i-1)[p and halo] += ∂<G_i[p], y>/∂z;        θ.grad += ∂<G_i[p], y>/∂θ

No table is read where it is being written, so each group has one table of activations and one of gradients, whatever
the depth. On the lattice of q (see :mod:`recollect.frames`) the activations come back bit for bit.

Other networks, written layer by layer, have a table for the input of each layer, or of every s-th, from which those
between are computed again. Of several losses the gradients' Gramian is computed in the same way, with rows for each
loss in the tables of gradients; see :meth:`WholeGraph.step`.
"""

from recollect.outofcore._whole_graph import WholeGraph

__all__ = ["WholeGraph"]
