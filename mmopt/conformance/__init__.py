"""Recorded cases of reference implementations, replayed at every level from model to engine.

In: files of recorded tensors.
Out: largest errors, and what could not be compared.
"""
