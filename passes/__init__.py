"""One file a pass; no pass imports another.

In: a Program.
Out: an equal (or measurably near) Program, and a report of what was done and why the rest was left alone.
"""
