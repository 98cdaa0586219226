"""From a Program to an engine directory: ONNX graphs, their weights once, program.json.

In: a Program, a target, a dtype.
Out: a directory that appears whole or not at all.
"""
