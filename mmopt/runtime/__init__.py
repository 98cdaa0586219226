"""Runs engine directories with ONNX Runtime; needs neither torch nor onnx.

In: an engine directory and requests.
Out: text, tokens, pictures, stored prefixes.
"""
