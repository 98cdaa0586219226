"""What is written into an engine directory, and what compiler and engine both do with it; numpy alone.

In: program.json, prompts of ids, plans of solvers, arrays of the host.
Out: typed records, laid-out prompts, masks, steps of a sampler.
"""
