"""The one table of dtypes: how numpy, ONNX and safetensors hold what torch calls by the same name."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class DType(NamedTuple):
    """numpy: how arrays store it (numpy has no bfloat16: its bits are kept); onnx: its number in TensorProto."""

    numpy: type
    onnx: int
    safetensors: str

    @property
    def bytes(self) -> int:
        return np.dtype(self.numpy).itemsize


DTYPES = {
    "float32": DType(np.float32, 1, "F32"),
    "uint8": DType(np.uint8, 2, "U8"),
    "int8": DType(np.int8, 3, "I8"),
    "int32": DType(np.int32, 6, "I32"),
    "int64": DType(np.int64, 7, "I64"),
    "bool": DType(np.bool_, 9, "BOOL"),
    "float16": DType(np.float16, 10, "F16"),
    "float64": DType(np.float64, 11, "F64"),
    "bfloat16": DType(np.uint16, 16, "BF16"),
}
MODEL_DTYPES = {n: n for n in ("float32", "float16", "bfloat16")} | {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""What a model may be loaded or exported in, by long and by short name."""
