"""Choose the precision of every unit from tables: a plan within a budget, and the Pareto front around it."""
