"""The Gramian of the Jacobian of many losses, layer by layer, without the Jacobian.

After Algorithm 3 of "Jacobian Descent for Multi-Objective Optimization" (arXiv 2406.16232).
"""
