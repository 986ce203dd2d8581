"""A memory budget for any model: measure, solve, apply, verify.

`plan` measures every unit of a model in one forward pass, solves which are stored, stored in part, checkpointed (alone
or in a row), inverted or offloaded, and verifies the choice by a real step. `apply` runs units in frames without a
plan. Both put themselves in front of ``forward`` on the instances: a model's class, names and state dict stay what they
are.
"""

from recollect.budget._lightning import LightningBudget
from recollect.budget._plan import BudgetError, BudgetWarning, Plan
from recollect.budget._planning import plan
from recollect.budget._rows import Row
from recollect.budget._treatment import Applied, apply
from recollect.budget._units import find_units

__all__ = ["Applied", "BudgetError", "BudgetWarning", "LightningBudget", "Plan", "Row", "apply", "find_units", "plan"]
