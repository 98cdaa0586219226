"""Fits flow plans to a model and measures them.

In: a Program that generates images, and prompts.
Out: plans of few steps, with their errors.
"""
