"""Fewer visual tokens: where they can be left out, which stay, and what follows from that in the graphs.

In: a Program, a site, a method, a share to keep.
Out: a Program with fewer tokens of each image.
"""
