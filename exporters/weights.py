"""The constants of a bundle, each stored once, and the safetensors file they are streamed into.

ONNX graphs refer to a safetensors file as external data: the offset of a tensor is 8 + the length of the header + its
data offset. Nothing is held in memory: a constant that a pass left as an expression of weights is evaluated when its
turn comes to be written, and freed. Weights that nobody changed can stay in the checkpoint's own file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.fx import Node

from mmopt.ir.graph import CAT, EXPAND, PERMUTE, RESHAPE, SLICE, shape_of
from mmopt.ir.printer import op_name
from mmopt.ir.program import Program
from mmopt.ir.stage import evaluate
from mmopt.spec.dtypes import DTYPES
from mmopt.spec.manifest import WeightFile

ONNX_TYPE = {getattr(torch, name): d.onnx for name, d in DTYPES.items()}
SAFETENSORS_TYPE = {getattr(torch, name): d.safetensors for name, d in DTYPES.items()}
FILE = "weights.safetensors"
ALIGN = 64
CHUNK = 1 << 24  # elements cast, and bytes copied, at a time
MOVES = {CAT, EXPAND, PERMUTE, RESHAPE, SLICE}  # operators that compute nothing
Progress = Callable[[str], None]


@dataclass
class Constant:
    """A tensor of the bundle: what computes it, and where it lies once that is known."""

    node: Node
    dtype: torch.dtype
    file: str = FILE
    offset: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(s) for s in shape_of(self.node))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """Collects the constants of all stages. Equal expressions of the same weights are one constant."""

    def __init__(self, program: Program, dtype: torch.dtype):
        self.program, self.dtype = program, dtype
        self.constants: dict[str, Constant] = {}
        self._names: dict[tuple[int, torch.dtype], str] = {}
        self._inline: dict[tuple[int, torch.dtype], tuple[str, TensorProto]] = {}
        self._ids: dict[Any, int] = {}
        self._node_ids: dict[Node, int] = {}

    def exported(self, dtype: torch.dtype, stage: str | None = None) -> torch.dtype:
        """The dtype in the bundle of a value that has `dtype` in the program.

        Stages that ``info.full_precision_stages`` names for the dtype of the bundle are in float32.
        """
        if dtype != self.program.dtype:
            return dtype
        full = self.program.info.full_precision_stages.get(str(self.dtype).removeprefix("torch."), ())
        return torch.float32 if stage in full else self.dtype

    def at_border(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of an input or output of a stage; what ``info.full_precision_values`` names keeps its own."""
        return dtype if name in self.program.info.full_precision_values else self.exported(dtype)

    def names(self) -> list[str]:
        return list(self.constants)

    def add(self, node: Node, stage: str | None = None) -> tuple[str, TensorProto | None]:
        """The name of a constant node; scalars and short lists of integers come with data, to stand in the graph."""
        dtype, shape = self.exported(node.meta["dtype"], stage), shape_of(node)
        key = self._identity(node), dtype  # a stage of full precision may share a weight with another
        if key in self._inline:
            return self._inline[key]
        if key not in self._names:
            name = self._name(node)
            size = torch.Size(shape).numel()
            if size <= 1 or (len(shape) == 1 and size <= 64 and not dtype.is_floating_point):
                self._inline[key] = name, tensor_proto(name, self.value(node).to(dtype))
                return self._inline[key]
            self._names[key] = name
            self.constants[name] = Constant(node, dtype)
        return self._names[key], None

    def keep(self, names: set[str]) -> None:
        """Forget the constants that no graph refers to."""
        self.constants = {name: c for name, c in self.constants.items() if name in names}

    def reference(self, name: str) -> TensorProto:
        """An initializer that refers to the file; `place` fills in where the data lies."""
        c = self.constants[name]
        return TensorProto(name=name, data_type=ONNX_TYPE[c.dtype], dims=c.shape, data_location=TensorProto.EXTERNAL)

    def place(self, initializer: TensorProto) -> None:
        """Fill in file, offset and length of an initializer made by `reference`. Call after `layout`."""
        c = self.constants[initializer.name]
        for key, value in (("location", c.file), ("offset", c.offset), ("length", c.nbytes)):
            initializer.external_data.add(key=key, value=str(value))

    def value(self, node: Node) -> Tensor:
        """Evaluate a constant; of what it is computed from, only what is still needed is held.

        Arithmetic on half-precision weights is done in float32, so that the result is rounded once, when it is written.
        """
        order: list[Node] = []
        stack, seen = [node], set()
        while stack:  # depth first, operands before what reads them
            n = stack[-1]
            todo = [a for a in n.all_input_nodes if a not in seen]
            if todo:
                stack += todo
            else:
                stack.pop()
                if n not in seen:
                    seen.add(n)
                    order.append(n)
        half = self.program.dtype in (torch.float16, torch.bfloat16)
        widen = half and any(n.op == "call_function" and n.target not in MOVES for n in order)
        last = {a: n for n in order for a in n.all_input_nodes}
        env: dict[Node, Any] = {}
        with torch.inference_mode():
            for n in order:
                made = self._weight(n) if n.op == "get_attr" else evaluate(n, env, {})
                env[n] = made.float() if widen and made.dtype == self.program.dtype else made
                for a in n.all_input_nodes:
                    if last[a] is n:
                        env.pop(a, None)
        return env[node].detach()

    def _weight(self, n: Node) -> Tensor:
        return self.program.weights[str(n.target)]

    def _identity(self, node: Node) -> int:
        """Equal numbers for equal expressions of equal weights."""
        if node not in self._node_ids:
            key: Any
            if node.op == "get_attr":
                w = self._weight(node)
                key = (w.data_ptr(), tuple(w.shape), w.stride(), w.dtype)
            else:

                def label(a: Any) -> Any:
                    return f"#{self._identity(a)}" if isinstance(a, Node) else a

                args = torch.fx.node.map_aggregate(node.args, label)
                key = (str(node.target), repr(args), repr(node.meta["shape"]), repr(node.meta["dtype"]))
            self._node_ids[node] = self._ids.setdefault(key, len(self._ids))
        return self._node_ids[node]

    def _name(self, node: Node) -> str:
        """A weight keeps its name; anything else is called after its operator and the weights it is made of."""
        sources: dict[str, None] = {}
        stack = [node]
        while stack and len(sources) < 4:
            n = stack.pop()
            stack += reversed(n.all_input_nodes)
            if n.op == "get_attr":
                sources[str(n.target)] = None
        listed = list(sources)
        more = [] if len(listed) < 4 else ["..."]
        base = str(node.target) if node.op == "get_attr" else f"{op_name(node)}({', '.join(listed[:3] + more)})"
        name, i = base, 1
        while name in self.constants or any(name == inline for inline, _ in self._inline.values()):
            i += 1
            name = f"{base}#{i}"
        return name

    # ---------------------------------------------------------------------------------------------------------- files
    def link(self, checkpoint: Path) -> dict[str, Path]:
        """Let unchanged weights refer to the checkpoint's safetensors files; returns these by name in the bundle."""
        linked = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            header, start = read_header(path)
            here = {name: c for name, c in self.constants.items() if c.node.op == "get_attr" and name in header}
            found = {name: header[name] for name, c in here.items() if self._unchanged(c, path, header[name], start)}
            if not found:
                continue
            file = path.name if path.name != FILE else "checkpoint." + FILE
            linked[file] = path
            for name, entry in found.items():
                self.constants[name].file = file
                self.constants[name].offset = start + entry["data_offsets"][0]
        return linked

    def _unchanged(self, c: Constant, path: Path, entry: dict, start: int) -> bool:
        w = self._weight(c.node)
        if w.dtype != c.dtype or SAFETENSORS_TYPE[c.dtype] != entry["dtype"] or list(c.shape) != entry["shape"]:
            return False
        begin, end = entry["data_offsets"]
        stored = torch.from_file(str(path), shared=False, size=start + end, dtype=torch.uint8)[start + begin :]
        ours = w.detach().contiguous().reshape(-1).view(torch.uint8)
        return all(torch.equal(a, b) for a, b in zip(ours.split(CHUNK), stored.split(CHUNK), strict=True))

    def layout(self) -> bytes:
        """The header of the file to be written; sets the offsets of all constants that go into it."""
        mine = {name: c for name, c in self.constants.items() if c.file == FILE}
        ordered = sorted(mine, key=lambda n: -mine[n].dtype.itemsize)  # stable; keeps every tensor aligned
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in ordered:
            c = mine[name]
            offsets = [position, position + c.nbytes]
            header[name] = {"dtype": SAFETENSORS_TYPE[c.dtype], "shape": list(c.shape), "data_offsets": offsets}
            position += c.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        for name in ordered:
            mine[name].offset = 8 + len(text) + header[name]["data_offsets"][0]
        return struct.pack("<Q", len(text)) + text

    def write(self, path: Path, header: bytes, progress: Progress | None = None) -> WeightFile:
        """Stream all constants that are not linked; returns name, size and checksum of the file."""
        digest = hashlib.sha256(header)
        mine = sorted((c.offset, name) for name, c in self.constants.items() if c.file == FILE)
        total = len(header) + sum(self.constants[name].nbytes for _, name in mine)
        with open(path, "wb") as f:
            f.write(header)
            for offset, name in mine:
                if f.tell() != offset:
                    raise AssertionError(f"{name}: at {f.tell()}, its place is {offset}")
                c = self.constants[name]
                for part in self.value(c.node).reshape(-1).split(CHUNK):
                    raw = memoryview(part.to(c.dtype).contiguous().view(torch.uint8).numpy())
                    digest.update(raw)
                    f.write(raw)
                if progress:
                    progress(f"weights, {f.tell() / 1e6:.0f} of {total / 1e6:.0f} MB")
        return WeightFile(path.name, total, digest.hexdigest())


def tensor_proto(name: str, x: Tensor) -> TensorProto:
    """A tensor with its data inside."""
    x = x.contiguous()
    if x.dtype == torch.bfloat16:
        raw = x.reshape(-1).view(torch.uint8).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, list(x.shape), raw, raw=True)
    return numpy_helper.from_array(np.asarray(x.numpy()), name)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(length)), 8 + length


def bring(source: Path, target: Path) -> None:
    """Make `source` appear as `target`: a hard link where the file system allows, else a copy."""
    source = source.resolve()  # hub caches are symbolic links
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
