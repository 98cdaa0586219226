"""Budgets: which compression and which plan keep quality or drift, and the public `optimize`.

In: a Program and a budget.
Out: the cheapest Program that keeps it, and all that was measured.
"""
