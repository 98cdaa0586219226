"""Speed, memory and quality, paired in one run.

In: models, Programs, engines, tasks.
Out: result records, tables, plots.
"""
