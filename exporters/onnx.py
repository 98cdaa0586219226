"""export(program, out): an engine directory of ONNX graphs, one weights file, program.json and the tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch

from mmopt.checkpoint import DTYPES
from mmopt.exporters.emit import Emitter, ExportError, output_name, plain_shape
from mmopt.exporters.weights import FILE, Progress, Weights
from mmopt.graph import shape_of
from mmopt.program import Loop, Program, Stage

SCHEMA = 1
TARGETS = ("onnx", "tensorrt")
HOST_VALUES = {"ids", "done"}  # choosing the next token is the engine's part, not a graph


def export(
    program: Program,
    out: str | Path,
    target: str = "onnx",
    dtype: str | torch.dtype | None = None,
    weights: str = "copy",
    reports: Iterable[Any] = (),
    progress: Progress | None = None,
    check: bool = True,
) -> Path:
    """Write `program` as an engine directory and return its path."""
    out = Path(out)
    if target not in TARGETS:
        raise ExportError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if weights not in ("copy", "link"):
        raise ExportError(f"weights is {weights!r}, expected 'copy' or 'link'")
    if not program.has_weights:
        raise ExportError("this Program has shapes only, no weights: there is nothing to export")
    kind = _dtype(program, target, dtype)
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(partial, program, target, kind, weights, list(reports), progress, check)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _dtype(program: Program, target: str, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32 if target == "onnx" else program.info["torch_dtype"]
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPES.values():
        raise ExportError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    return kind


def _refuse_foreign(out: Path) -> None:
    """An existing directory is replaced only if it is empty or was made here."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = "schema" in json.loads((out / "program.json").read_text()) and out.is_dir()
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ExportError(f"{out}: exists and is not an engine directory; name another one or remove it")


def _replace(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _fill(
    directory: Path, program: Program, target: str, dtype: torch.dtype, weights: str, reports: list, progress: Any, check: bool
) -> None:
    if target == "onnx":
        from mmopt.exporters.lower_onnxruntime import RULES
    else:
        from mmopt.exporters.lower_tensorrt import RULES
    store = Weights(program, dtype)
    stages = {name: s for name, s in program.stages.items() if not set(s.outputs) <= HOST_VALUES}
    protos = {name: Emitter(name, stage, RULES, store).run() for name, stage in stages.items()}
    checkpoint = program.info.get("directory")
    linked = store.link(Path(checkpoint), directory) if weights == "link" and checkpoint else []
    header = store.layout()
    listed = {}
    for name, proto in protos.items():
        for initializer in proto.graph.initializer:
            if initializer.data_location == onnx.TensorProto.EXTERNAL:
                store.place(initializer)
        data = proto.SerializeToString()
        (directory / f"{name}.onnx").write_bytes(data)
        listed[name] = _describe(name, stages[name], store, hashlib.sha256(data).hexdigest())
    written = store.write(directory / FILE, header, progress)
    if check:
        for name in protos:
            onnx.checker.check_model(str(directory / f"{name}.onnx"))
    info = program.info
    facts = {
        "schema": SCHEMA,
        "mmopt": _version("mmopt"),
        "versions": {p: _version(p) for p in ("torch", "onnx", "onnxruntime")},
        "target": target,
        "dtype": _name(dtype),
        "info": {k: v for k, v in info.items() if k not in ("torch_dtype", "dtype", "processing", "directory")},
        "stages": listed,
        "schedule": [_item(i) for i in program.schedule],
        "state": {
            k: {"shape": list(shape), "dtype": _name(store.exported(d))} for k, (shape, d) in program.state.items()
        },
        "weights": written | ({"linked": linked} if linked else {}),
        "processing": {**info.get("processing", {}), "tokenizer": _tokenizer(checkpoint, directory)},
        "reports": [dataclasses.asdict(r) if dataclasses.is_dataclass(r) else r for r in reports],  # type: ignore[arg-type]
    }
    (directory / "program.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False))


def _describe(name: str, stage: Stage, store: Weights, digest: str) -> dict[str, Any]:
    def value(node: Any) -> dict[str, Any]:
        return {"shape": plain_shape(shape_of(node)), "dtype": _name(store.exported(node.meta["dtype"]))}

    outputs = {}
    for k, node in stage.output_nodes().items():
        outputs[k] = value(node)
        if output_name(stage, k) != k:
            outputs[k]["onnx"] = output_name(stage, k)
    inputs = {k: value(node) for k, node in stage.input_nodes().items()}
    return {"file": f"{name}.onnx", "sha256": digest, "inputs": inputs, "outputs": outputs}


def _item(item: Any) -> dict[str, Any]:
    if isinstance(item, Loop):
        return {"loop": [_item(c) for c in item.body], "over": item.over, "trips": item.trips, "until": item.until}
    return {"call": item.stage, "rename": dict(item.rename)}


def _tokenizer(checkpoint: str | None, directory: Path) -> str | None:
    """Copy tokenizer.json, or convert tokenizer.model and prove that both give the same ids."""
    if checkpoint is None:
        return None
    ready, model = Path(checkpoint) / "tokenizer.json", Path(checkpoint) / "tokenizer.model"
    made = directory / "tokenizer.json"
    if ready.is_file():
        shutil.copyfile(ready, made)
    elif model.is_file():
        from mmopt.sentencepiece import convert_sentencepiece, prove_equal

        tokenizer = convert_sentencepiece(model)
        prove_equal(model, tokenizer)
        tokenizer.save(str(made))
    else:
        return None
    return made.name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
