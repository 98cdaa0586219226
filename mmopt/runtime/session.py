"""Engine directories, ONNX Runtime sessions, and the memory that sessions read and write in place."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnxruntime as ort

from mmopt.runtime.tensor import Tensor
from mmopt.spec.dtypes import DTYPES
from mmopt.spec.errors import EngineError
from mmopt.spec.manifest import StageInfo

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"),
}


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


# -------------------------------------------------------------------------------------------------------- sessions
class StageSession:
    """One stage of an engine directory, loaded. `inputs` and `outputs`: name -> shape and dtype, as in program.json."""

    def __init__(self, name: str, directory: Path, stage: StageInfo, provider: str, threads: int):
        self.name, self.inputs, self.outputs = name, stage.inputs, stage.outputs
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
            self.session = ort.InferenceSession(directory / stage.file, options, providers=providers)
        except Exception as e:  # ONNX Runtime has many error types, none of them public
            raise EngineError(f"{directory / stage.file}: ONNX Runtime cannot load stage {name}: {e}") from e
        if chosen not in self.session.get_providers():  # ONNX Runtime falls back silently
            raise EngineError(
                f"provider {provider!r} is installed but cannot start (a driver or a library is missing); "
                f"stage {name} would run on {', '.join(self.session.get_providers())}"
            )

    def empty(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Memory for an output of these inputs."""
        return Tensor.zeros(self.output_shape(name, inputs), self.outputs[name].dtype, self.device)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> IoBinding:
        """Fix the memory of all inputs and outputs."""
        return IoBinding(self, inputs, outputs)

    def output_shape(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Shape of an output whose free sizes are sizes of inputs."""
        sizes: dict[str, int] = {}
        for k, value in inputs.items():
            sizes |= {s: n for s, n in zip(self.inputs[k].shape, value.shape, strict=True) if isinstance(s, str)}
        return tuple(size_of(s, sizes) for s in self.outputs[name].shape)


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

    def __init__(self, directory: Path, stages: dict[str, StageInfo], provider: str, threads: int, single: set[str]):
        self._directory, self._stages, self._provider, self._threads = directory, stages, provider, threads
        self._single, self._lock = single, threading.Lock()
        self._loaded: dict[str, StageSession] = {}

    def __getitem__(self, name: str) -> StageSession:
        with self._lock:
            if name not in self._loaded:
                threads = 1 if name in self._single else self._threads
                self._loaded[name] = StageSession(name, self._directory, self._stages[name], self._provider, threads)
            return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)


class IoBinding:
    """A session with its inputs and outputs bound to memory; `run` costs a few microseconds above the computation."""

    def __init__(self, stage: StageSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]):
        self._session = stage.session
        self._memory = (dict(inputs), dict(outputs))  # bound by address: must live as long
        self._binding = stage.session.io_binding()
        for name, t in inputs.items():
            self._binding.bind_input(name, t.device, 0, DTYPES[t.dtype].onnx, t.shape, t.pointer)
        for name, t in outputs.items():
            target = stage.outputs[name].onnx or name
            self._binding.bind_output(target, t.device, 0, DTYPES[t.dtype].onnx, t.shape, t.pointer)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def default_threads() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
