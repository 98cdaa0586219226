"""export(program, out): an engine directory of ONNX graphs, their weights, program.json and the tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from mmopt.exporters import lower_onnxruntime, lower_tensorrt
from mmopt.exporters.compare import compare_with_program, why_not_compared
from mmopt.exporters.emit import Emitter, ExportError, output_name, plain_shape
from mmopt.exporters.tensorrt import MISSING, MOST_BYTES_TO_BUILD, GateError, available, check_stages
from mmopt.exporters.weights import FILE, Progress, Weights, bring, file_sha256
from mmopt.ir.graph import shape_of
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.processing.tokenizer import write_tokenizer
from mmopt.spec.dtypes import MODEL_DTYPES
from mmopt.spec.manifest import Checked, Manifest, PassInfo, StageInfo, TensorInfo, WeightFile
from mmopt.spec.typed_json import from_json

TARGETS = {"onnx": lower_onnxruntime.RULES, "tensorrt": lower_tensorrt.RULES}  # -> how operators are spelt

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
    gate: bool = True,
) -> Path:
    """Write `program` as an engine directory `out` and return its path.

    `target` is "onnx" (for ONNX Runtime; float32 unless `dtype` says otherwise) or "tensorrt" (standard ONNX operators;
    the dtype of the program). Each weight is stored once and streamed: no second copy is held in memory. `weights`
    "link" leaves weights that no pass changed, and that need no cast, in the checkpoint's own safetensors files, which
    are hard-linked into the directory (copied where the file system has no links). `reports` of passes go into
    program.json; `progress` is told in words what is being done.

    `check` runs the ONNX checker and, where that is affordable, compares the graphs in ONNX Runtime with the Program.
    `gate` parses and, unless it is very large, builds the "tensorrt" target if TensorRT for RTX is installed.
    program.json says what was checked.

    The directory appears whole or not at all; one made by an earlier export is replaced. Raises ExportError (an option
    or operator that is not supported, a directory of other content, graphs that differ from the Program) and GateError.
    """
    out = Path(out)
    if target not in TARGETS:
        raise ExportError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if weights not in ("copy", "link"):
        raise ExportError(f"weights is {weights!r}, expected 'copy' or 'link'")
    if not program.has_weights:
        raise ExportError("this Program has shapes only, no weights: there is nothing to export")
    kind = _dtype(program, target, dtype)
    _refuse_foreign(out)
    tell = progress or (lambda text: None)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        manifest, linked = _write(partial, program, target, kind, weights, tell)
        given = [r if isinstance(r, dict) else dataclasses.asdict(r) for r in reports]
        manifest = replace(manifest, reports=tuple(from_json(PassInfo, r, "reports") for r in given))
        if check:
            _check(partial, manifest, linked, tell)
        for file, source in linked.items():
            bring(source, partial / file)
        checked = _compare(partial, program, manifest, tell) if check else Checked()
        if target == "tensorrt":
            checked = replace(checked, tensorrt=_gate(partial, manifest, tell) if gate else "not asked for")
        replace(manifest, checked=checked).save(partial)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _dtype(program: Program, target: str, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32 if target == "onnx" else program.dtype
    name = MODEL_DTYPES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ExportError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    return getattr(torch, name)


def _refuse_foreign(out: Path) -> None:
    """An existing directory is replaced only if it is empty or was made here."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        facts = json.loads((out / "program.json").read_text())
        ours = "schema" in facts and "mmopt" in facts
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ExportError(f"{out}: exists and is not an engine directory; name another one or remove it")


def _replace(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    directory: Path, program: Program, target: str, dtype: torch.dtype, weights: str, tell: Progress
) -> tuple[Manifest, dict[str, Path]]:
    """Graphs, weights and tokenizer; returns what program.json says of them, and the files still to be linked."""
    store = Weights(program, dtype)
    stages = {name: s for name, s in program.stages.items() if not set(s.outputs) <= HOST_VALUES}
    protos, emitters = {}, {}
    for name, stage in stages.items():
        tell(f"graph of {name}")
        emitters[name] = Emitter(name, stage, TARGETS[target], store)
        protos[name] = emitters[name].run()
    external = [i for p in protos.values() for i in p.graph.initializer if i.data_location == i.EXTERNAL]
    store.keep({i.name for i in external})
    checkpoint = program.source.directory
    linked = {}
    if weights == "link" and checkpoint:
        tell("comparing with the checkpoint's weights")
        linked = store.link(Path(checkpoint))
    header = store.layout()
    for initializer in external:
        store.place(initializer)
    listed = {}
    for name, proto in protos.items():
        data = proto.SerializeToString()
        (directory / f"{name}.onnx").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        listed[name] = _describe(name, stages[name], store, digest, emitters[name].one_sample)
    files = [store.write(directory / FILE, header, tell)]
    files += [WeightFile(f, p.stat().st_size, file_sha256(p)) for f, p in linked.items()]
    manifest = Manifest(
        mmopt=_version("mmopt"),
        versions={p: _version(p) for p in ("torch", "onnx", "onnxruntime")},
        target=target,
        dtype=_name(dtype),
        info=program.info,
        stages=listed,
        schedules=program.schedules,
        state={k: TensorInfo(tuple(shape), _name(store.exported(d))) for k, (shape, d) in program.state.items()},
        weights=tuple(files),
        tokenizer=write_tokenizer(program.source.directory, program.source.tokenizer, directory),
    )
    return manifest, linked


def _describe(name: str, stage: Stage, store: Weights, digest: str, one_sample: bool) -> StageInfo:
    """one_sample: several tokens on a cache that is not empty go through it sample by sample."""

    def value(k: str, node: Any, onnx: str | None = None) -> TensorInfo:
        return TensorInfo(tuple(plain_shape(shape_of(node))), _name(store.at_border(k, node.meta["dtype"])), onnx)

    inputs = {k: value(k, node) for k, node in stage.input_nodes().items()}
    names = {k: output_name(stage, k) for k in stage.outputs}
    outputs = {k: value(k, node, names[k] if names[k] != k else None) for k, node in stage.output_nodes().items()}
    return StageInfo(f"{name}.onnx", digest, inputs, outputs, one_sample)


def _check(directory: Path, manifest: Manifest, linked: dict[str, Path], tell: Progress) -> None:
    """The ONNX checker, which refuses hard links: empty files of the right size stand in for those to be linked."""
    for file, source in linked.items():
        with open(directory / file, "wb") as f:
            f.truncate(source.stat().st_size)
    for stage in manifest.stages.values():
        tell(f"checking {stage.file}")
        try:
            onnx.checker.check_model(str(directory / stage.file))
        except onnx.checker.ValidationError as e:
            raise ExportError(f"{stage.file}: the ONNX checker refuses it: {e}") from e
    for file in linked:
        (directory / file).unlink()


def _compare(directory: Path, program: Program, manifest: Manifest, tell: Progress) -> Checked:
    skipped = why_not_compared(program, manifest)
    if skipped is None:
        tell("comparing with the program")
        found = compare_with_program(directory, program, manifest)
        if found is not None:
            raise ExportError(f"the graphs do not give what the Program gives: {found}")
    return Checked("passed", f"not compared: {skipped}" if skipped else "equal")


def _gate(directory: Path, manifest: Manifest, tell: Progress) -> str:
    if not available():
        return f"not checked: {MISSING}"
    build = manifest.weight_bytes <= MOST_BYTES_TO_BUILD
    findings = check_stages(directory, manifest, build, tell)
    if findings:
        raise GateError(findings)
    return "parsed and built" if build else "parsed, too large to build here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
