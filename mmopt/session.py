"""Engine directories, ONNX Runtime sessions, and the memory that sessions read and write in place."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

SCHEMA = 1  # the newest program.json that is understood
# dtype -> how numpy stores it (numpy has no bfloat16: its bits are kept) and its number in ONNX
DTYPES: dict[str, tuple[type, int]] = {
    "float32": (np.float32, 1),
    "int32": (np.int32, 6),
    "int64": (np.int64, 7),
    "bool": (np.bool_, 9),
    "float16": (np.float16, 10),
    "bfloat16": (np.uint16, 16),
}
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"),
}


class EngineError(ValueError):
    """A directory, a request or an option that an engine cannot work with; the message names it and the reason."""


# ------------------------------------------------------------------------------------------------ engine directories
def read_directory(directory: Path, verify_checksums: bool = False) -> dict[str, Any]:
    """Read program.json and check that the files it lists are there and whole.

    The size of the weights and the checksums of the graphs are always checked, the checksum of the weights only with
    `verify_checksums`: it has to read them all. Raises EngineError.
    """
    if not directory.is_dir():
        raise EngineError(f"{directory}: no such directory")
    path = directory / "program.json"
    if not path.is_file():
        raise EngineError(f"{directory}: not an engine directory, it has no program.json (`mmopt export` makes one)")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EngineError(f"{path}: cannot be read ({e})") from e
    if not isinstance(facts, dict) or not isinstance(facts.get("schema"), int):
        raise EngineError(f"{path}: not written by mmopt, it has no schema number")
    if facts["schema"] > SCHEMA:
        raise EngineError(
            f"{path}: has schema {facts['schema']}, written by mmopt {facts.get('mmopt')}; this mmopt knows schemas up "
            f"to {SCHEMA}: upgrade it or export again"
        )
    missing = [k for k in ("dtype", "info", "stages", "schedule", "weights", "processing") if k not in facts]
    if missing:
        raise EngineError(f"{path}: lacks {', '.join(missing)}")
    try:
        for stage in facts["stages"].values():
            _check_file(directory / stage["file"], None, stage["sha256"])
        for entry in (facts["weights"], *facts["weights"].get("linked", ())):
            _check_file(directory / entry["file"], entry["bytes"], entry["sha256"] if verify_checksums else None)
        if tokenizer := facts["processing"].get("tokenizer"):
            _check_file(directory / tokenizer, None, None)
    except (AttributeError, KeyError, TypeError) as e:
        raise EngineError(f"{path}: not of the expected form ({type(e).__name__}: {e})") from e
    return facts


def _check_file(path: Path, size: int | None, digest: str | None) -> None:
    if not path.is_file():
        raise EngineError(f"{path}: listed in program.json, but not there; the directory is incomplete")
    found_size = path.stat().st_size
    if size is not None and found_size != size:
        raise EngineError(f"{path}: has {found_size} bytes, program.json says {size}; the file is truncated or foreign")
    if digest is not None:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != digest:
            raise EngineError(f"{path}: its sha256 is {found}, program.json says {digest}; the file was changed")


# ------------------------------------------------------------------------------------------------------- providers
def available_providers() -> list[str]:
    """Those of "cpu", "cuda" and "tensorrt" that the installed ONNX Runtime has."""
    return [name for name, known in PROVIDERS.items() if set(known) & set(ort.get_available_providers())]


def choose_provider(provider: str | None, dtype: str) -> str:
    """The provider to use; None takes "cuda" where there is one, else "cpu". EngineError says what there is."""
    available = available_providers()
    if provider is None:
        provider = "cuda" if "cuda" in available else "cpu"
    if provider not in PROVIDERS:
        raise EngineError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}")
    if provider not in available:
        raise EngineError(
            f"provider {provider!r} is not available: ONNX Runtime {ort.__version__} as installed has "
            f"{', '.join(available)}; `pip install mmopt[gpu]` in place of onnxruntime brings cuda and tensorrt"
        )
    if provider == "cpu" and dtype == "bfloat16":
        raise EngineError(
            "this engine computes in bfloat16, which ONNX Runtime cannot do on the CPU: export it with dtype float32, "
            f"or use another provider (available: {', '.join(available)})"
        )
    return provider


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
        return cls.of(np.zeros(shape, DTYPES[dtype][0]), dtype, device)

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
        step = math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype][0]).itemsize
        return Tensor((stop - start, *self.shape[1:]), self.dtype, self.pointer + start * step, self.device, self.owner)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][0]).itemsize

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
            self.owner.update_inplace(np.ascontiguousarray(array, DTYPES[self.dtype][0]))

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
        return array.astype(DTYPES[dtype][0], copy=False)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


# -------------------------------------------------------------------------------------------------------- sessions
class StageSession:
    """One stage of an engine directory, loaded. `inputs` and `outputs`: name -> shape and dtype, as in program.json."""

    def __init__(self, name: str, directory: Path, facts: dict[str, Any], provider: str, threads: int):
        self.name, self.inputs, self.outputs = name, facts["inputs"], facts["outputs"]
        self.device = "cpu" if provider == "cpu" else "cuda"
        there = ort.get_available_providers()
        chosen = next(p for p in PROVIDERS[provider] if p in there)
        behind = () if provider == "cpu" else (*PROVIDERS["cuda"], *PROVIDERS["cpu"])
        providers = [chosen, *(p for p in behind if p in there and p != chosen)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # else the working memory of the longest prompt is kept for good
        # each stage has threads of its own, which else go on spinning for a while where the next stage needs the cores
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(directory / facts["file"], options, providers=providers)
        except Exception as e:  # ONNX Runtime has many error types, none of them public
            raise EngineError(f"{directory / facts['file']}: ONNX Runtime cannot load stage {name}: {e}") from e
        if chosen not in self.session.get_providers():  # ONNX Runtime falls back silently
            raise EngineError(
                f"provider {provider!r} is installed but cannot start (a driver or a library is missing); "
                f"stage {name} would run on {', '.join(self.session.get_providers())}"
            )

    def empty(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Memory for an output of these inputs."""
        return Tensor.zeros(self.output_shape(name, inputs), self.outputs[name]["dtype"], self.device)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Bound:
        """Fix the memory of all inputs and outputs."""
        return Bound(self, inputs, outputs)

    def output_shape(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of an output whose free sizes are sizes of inputs."""
        sizes: dict[str, int] = {}
        for k, value in inputs.items():
            sizes |= {s: n for s, n in zip(self.inputs[k]["shape"], value.shape, strict=True) if isinstance(s, str)}
        return tuple(size_of(s, sizes) for s in self.outputs[name]["shape"])


def size_of(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size as program.json spells it: a number, a name, or a sum of products of these, divided by numbers."""
    if isinstance(size, int):
        return size
    total = 0
    for term in size.split(" + "):
        product, _, divisor = term.partition("/")
        total += math.prod(sizes[f] if f in sizes else int(f) for f in product.split("*")) // int(divisor or 1)
    return total


class Sessions(Mapping[str, StageSession]):
    """The stages of an engine directory; each is loaded when it is first asked for. Safe to use from several threads.

    single: stages that run with one thread.
    """

    def __init__(self, directory: Path, stages: dict[str, Any], provider: str, threads: int, single: set[str]):
        self._directory, self._stages, self._provider, self._threads = directory, stages, provider, threads
        self._single, self._lock = single, threading.Lock()
        self._loaded: dict[str, StageSession] = {}

    def __getitem__(self, name: str) -> StageSession:
        with self._lock:
            if name not in self._loaded:
                threads = 1 if name in self._single else self._threads
                facts = self._stages[name]
                self._loaded[name] = StageSession(name, self._directory, facts, self._provider, threads)
            return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


class Bound:
    """A session with its inputs and outputs bound to memory; `run` costs a few microseconds above the computation."""

    def __init__(self, stage: StageSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]):
        self._session = stage.session
        self._memory = (dict(inputs), dict(outputs))  # bound by address: must live as long
        self._binding = stage.session.io_binding()
        for name, t in inputs.items():
            self._binding.bind_input(name, t.device, 0, DTYPES[t.dtype][1], t.shape, t.pointer)
        for name, t in outputs.items():
            target = stage.outputs[name].get("onnx", name)
            self._binding.bind_output(target, t.device, 0, DTYPES[t.dtype][1], t.shape, t.pointer)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
