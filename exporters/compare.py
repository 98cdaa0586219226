"""Exported graphs, run in ONNX Runtime on the CPU, against the stages of the Program that they were made from."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import onnxruntime as ort
import sympy
import torch

from mmopt.exporters.emit import ExportError, output_name
from mmopt.ir.attention_args import CachedAttention
from mmopt.ir.graph import CACHED_ATTENTION, shape_of, symbol
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite import contracts
from mmopt.rewrite.contracts import why_unchecked
from mmopt.spec.manifest import Manifest
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import LATE, POSITION_DELTAS

MOST_BYTES = 1 << 30  # of weights: a session holds them all
PAST = 2  # rows in the cache before the call, where a stage has a cache


def why_not_compared(program: Program, manifest: Manifest) -> str | None:
    """None if the graphs can be compared here, else the reason why not."""
    if manifest.dtype != "float32":
        return f"only float32 graphs are run here, these are in {manifest.dtype}"
    if manifest.weight_bytes > MOST_BYTES:
        return f"{manifest.weight_bytes / 1e9:.1f} GB of weights, more than {MOST_BYTES / 1e9:.1f}"
    return why_unchecked(program)


def compare_with_program(directory: Path, program: Program, manifest: Manifest) -> contracts.Difference | None:
    """The first difference of an output over several sizes of random inputs, or None."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    for name, listed in manifest.stages.items():
        stage = program.stages[name]
        try:
            session = ort.InferenceSession(directory / listed.file, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime has many error types, none of them public
            raise ExportError(f"stage {name}: ONNX Runtime does not load it: {e}") from e
        outputs = [output_name(stage, k) for k in stage.outputs]
        for seed, sizes in enumerate(sizes_of(stage, program.info)):
            values = random_values(stage, sizes, program.info, seed)
            expected = stage.run(program.weights, values, keep_constants=False)
            given = {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in values.items()}
            try:
                made = session.run(outputs, given)
            except Exception as e:
                raise ExportError(f"stage {name}: ONNX Runtime fails at {sizes}: {e}") from e
            for k, array in zip(stage.outputs, made, strict=True):
                wanted, value = expected[k], torch.from_numpy(array)
                node = stage.output_nodes()[k]
                if is_cache(node):  # what lies beyond the rows in use is not defined
                    used = rows_in_use(node.args[0], stage, sizes, values)
                    wanted, value = wanted[:, :, :used], value[:, :, :used]
                found = contracts.difference(wanted, value.to(wanted.dtype), program.dtype)
                if found is not None:
                    return contracts.Difference(name, f"{k} at {sizes}", node.name, *found)
    return None


def sizes_of(stage: Stage, info: ModelInfo) -> list[dict[str, int]]:
    """Sizes to try: with and without rows of an image, several rows on a cache (one sample), one row of all samples."""
    symbols = {str(s) for n in stage.placeholders() for s in shape_of(n) if isinstance(s, sympy.Symbol)}
    image = min(info.tokens_per_image, info.context - 8)
    keys = info.cross.tokens if info.cross else 1
    frames = min(3, info.max_frames or 3)
    tried = [
        {"B": 1, "N": 1, "F": frames, "n": 1, "nv": image, "nt": 3, "nb": 1, "S": 2, "L": 2, "K": keys},
        {"B": 1, "N": max(1, info.images), "F": 1, "n": 3, "nv": 0, "nt": 4, "nb": 3, "S": 1, "L": 4, "K": 2 * keys},
        {"B": info.batch, "N": 1, "F": 1, "n": 2, "nv": 0, "nt": 1, "nb": 2, "S": info.batch, "L": 1, "K": keys},
    ]
    return [{k: v for k, v in sizes.items() if k in symbols} for sizes in tried]


def random_values(stage: Stage, sizes: dict[str, int], info: ModelInfo, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = {}
    for name, node in stage.input_nodes().items():
        shape = [sizes[str(s)] if isinstance(s, sympy.Expr) else s for s in shape_of(node)]
        dtype = node.meta["dtype"]
        if name in ("offset", *POSITION_DELTAS):
            values[name] = torch.randint(0, 3, shape, generator=g)
        elif name == "past":
            values[name] = torch.full(shape, PAST, dtype=dtype)
        elif dtype.is_floating_point:
            values[name] = torch.randn(shape, generator=g).to(dtype)
        else:
            most = 2 if dtype == torch.bool else contracts.index_limit(node) or info.vocab_size
            if name in ("segment_rows", "row_segments"):  # indices of rows, and of places for rows
                most = sizes["B"] * sizes["nt"] if name == "segment_rows" else sizes["S"] * sizes["L"] + 1
            values[name] = torch.randint(0, most, shape, generator=g).to(dtype)
        if name == "key_mask":
            values[name][:, 0] = True
        if name.endswith("_sizes"):  # how many rows each stands for
            values[name] = values[name].abs() + 1
        if name == "time":
            values[name] = 1000 * torch.rand(shape, generator=g)
    return values


def rows_in_use(attention: Any, stage: Stage, sizes: dict[str, int], values: dict[str, torch.Tensor]) -> int:
    """Slots of a cache that are filled after a call: late layers may hold fewer rows than the others."""
    a = CachedAttention.of(attention)
    rows = int(sympy.sympify(shape_of(a.q)[1]).subs({symbol(k): v for k, v in sizes.items()}))
    late = a.past is not stage.input_nodes()["past"] and LATE in values
    return PAST + rows - (int(values[LATE].max()) if late else 0)


def is_cache(node: Any) -> bool:
    return node.target is operator.getitem and node.args[0].target is CACHED_ATTENTION and node.args[1] > 0
