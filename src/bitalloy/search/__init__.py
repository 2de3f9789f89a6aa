"""Choose the precision of every unit from tables: a plan within a budget, and the Pareto front around it."""

from bitalloy.search.choice import complete, search
from bitalloy.search.front import FRONT_BUDGETS, polish
from bitalloy.search.program import GAP, SHRINK, Limits, Problem, Program

__all__ = ["FRONT_BUDGETS", "GAP", "SHRINK", "Limits", "Problem", "Program", "complete", "polish", "search"]
