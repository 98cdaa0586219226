"""What the exporters' tests share: where the recorded checkpoint lies, and how a graph is loaded."""

from pathlib import Path

import onnxruntime as ort

DATA = Path(__file__).parents[1] / "data" / "mplug_owl2"


def session(path) -> ort.InferenceSession:
    """Default options but for two threads and fewer messages."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
