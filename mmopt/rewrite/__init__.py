"""What passes are made of, and the check of what they promise.

In: Programs, before and after.
Out: rewritten graphs, differences, reports.
"""
