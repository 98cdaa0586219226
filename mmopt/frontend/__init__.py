"""From a checkpoint on disk to a Program.

In: a directory, a hub id or a config.
Out: a loaded model, and its stages as graphs.
"""
