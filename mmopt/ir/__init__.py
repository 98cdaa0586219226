"""Programs: graphs of operators, the schedules that call them, the interpreter that is the reference, their cost.

In: graphs of torch.export.
Out: Programs that run, print and are counted.
"""
