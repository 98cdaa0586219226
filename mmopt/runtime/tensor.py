"""Arrays that a session binds by address, on the host or on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from mmopt.spec.dtypes import DTYPES


# ---------------------------------------------------------------------------------------------------------- memory
@dataclass(frozen=True)
class Tensor:
    """A piece of memory, on the host or on a device, that sessions read and write in place. Slices share memory."""

    shape: tuple[int, ...]
    dtype: str
    pointer: int
    device: str
    owner: Any  # the numpy array or OrtValue that holds the memory

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str, device: str = "cpu") -> Tensor:
        return cls.of(np.zeros(shape, DTYPES[dtype].numpy), dtype, device)

    @classmethod
    def of(cls, array: np.ndarray, dtype: str, device: str = "cpu") -> Tensor:
        """An array as memory of a device: itself on the CPU if it has the right type, else a copy."""
        bits = np.ascontiguousarray(to_bits(array, dtype))
        if device == "cpu":
            return cls(bits.shape, dtype, bits.ctypes.data, device, bits)
        value = ort.OrtValue.ortvalue_from_numpy(bits, device, 0)
        return cls(bits.shape, dtype, value.data_ptr(), device, value)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows of the first dimension."""
        start, stop, _ = rows.indices(self.shape[0])
        step = math.prod(self.shape[1:]) * DTYPES[self.dtype].bytes
        return Tensor((stop - start, *self.shape[1:]), self.dtype, self.pointer + start * step, self.device, self.owner)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].bytes

    def reshape(self, shape: tuple[int, ...]) -> Tensor:
        """The same memory in another shape of as many elements."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"a tensor of shape {self.shape} has no shape {shape}")
        return Tensor(shape, self.dtype, self.pointer, self.device, self.owner)

    def write(self, array: Any) -> None:
        """Set the values of a tensor that is not a slice."""
        if isinstance(self.owner, np.ndarray):
            self.owner[...] = array
        else:
            self.owner.update_inplace(np.ascontiguousarray(array, DTYPES[self.dtype].numpy))

    def numpy(self) -> np.ndarray:
        """The values: a view on the CPU (of bfloat16 a float32 copy), a copy of what is on a device."""
        on_host = isinstance(self.owner, np.ndarray)
        array = self.owner if on_host else self.owner.numpy()
        start = (self.pointer - (array.ctypes.data if on_host else self.owner.data_ptr())) // array.itemsize
        return from_bits(array.reshape(-1)[start : start + math.prod(self.shape)].reshape(self.shape), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype, copy=copy)


def to_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values -> how they are stored; bfloat16 is rounded to the nearest, ties to even."""
    if dtype != "bfloat16" or array.dtype == np.uint16:
        return array.astype(DTYPES[dtype].numpy, copy=False)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array
