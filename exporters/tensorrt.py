"""The gate of the TensorRT target: every stage is parsed and built ahead of time with TensorRT for RTX, without a GPU.

TensorRT for RTX is an extra (``pip install 'mmopt[tensorrt]'``); it is imported only when the gate runs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt.spec.manifest import Manifest, StageInfo, TensorInfo, read_directory
from mmopt.spec.model_info import ModelInfo
from mmopt.spec.prompt import POSITION_DELTAS

MOST_BYTES_TO_BUILD = 1 << 30  # of weights; a build takes about four times as much memory, a parse hardly any
MOST_FRAMES = 8  # of a video, where the model sets no limit
MOST_STEPS = 100  # of a flow
MISSING = "TensorRT for RTX is not installed: pip install 'mmopt[tensorrt]'"


@dataclass(frozen=True)
class Finding:
    """Why a stage does not convert: the node as it is named in the ONNX file, its operator, and TensorRT's words."""

    stage: str
    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"stage {self.stage}, node {self.node}, operator {self.operator}: {self.reason}"


class GateError(ValueError):
    """An engine directory that TensorRT does not take; ``findings`` lists every refusal."""

    def __init__(self, findings: list[Finding]):
        super().__init__("does not convert to TensorRT:\n  " + "\n  ".join(map(str, findings)))
        self.findings = findings


def available() -> bool:
    return importlib.util.find_spec("tensorrt_rtx") is not None


def check_engine(directory: str | Path, build: bool = True) -> list[Finding]:
    """Parse, and if `build` also build, each stage of an engine directory; returns what was refused.

    Raises ImportError without TensorRT for RTX.
    """
    directory = Path(directory)
    return check_stages(directory, read_directory(directory), build)


def check_stages(
    directory: Path, manifest: Manifest, build: bool = True, tell: Callable[[str], None] = lambda text: None
) -> list[Finding]:
    """As `check_engine`; `manifest` is what program.json holds or will hold."""
    try:
        import tensorrt_rtx as trt
    except ImportError as e:
        raise ImportError(MISSING) from e
    findings = []
    for name, stage in manifest.stages.items():
        tell(f"TensorRT: parsing and building {name}")
        shapes = profiles(stage.inputs, manifest.info)
        findings += _check_stage(trt, directory / stage.file, name, stage, shapes, build)
    return findings


def profiles(inputs: Mapping[str, TensorInfo], info: ModelInfo) -> list[dict[str, list[tuple[int, ...]]]]:
    """Optimization profiles of a stage: input -> its least, usual and largest shape.

    A stage with a cache, whose rows together must not exceed its capacity, gets three: a prompt with images, one of
    text alone (one sample each), and decode (one row of each sample). Where images lie outside the text there is one
    kind of prompt.
    """
    batch, context, images = info.batch, info.context, max(1, info.images) * info.batch
    visual = min(info.images * info.tokens_per_image, context - 1)
    one, none = (1, 1, 1), (0, 0, 0)

    def text(most: int) -> tuple[int, int, int]:
        return 1, min(64, most), most

    cross = info.cross
    if cross:
        blocks, keys = max(1, info.images) * cross.tiles, cross.tokens
        # A segment for each image, for text before all and for markers without one, cut where that costs less: see
        # `mmopt.spec.cross_mask.segments`.
        most = min(context, -(-(info.images + 2) * (context + keys) // (keys + 1)))
        ranges = [{"nb": (1, cross.tiles, blocks), "K": (keys, keys * cross.tiles, keys * blocks)}]
        if "past" in inputs:
            prompt = {"B": one, "nt": text(context), "S": (1, min(2, most), most), "L": text(context)}
            decode = {"B": (1, batch, batch), "nt": one, "S": (1, batch, batch), "L": one}
            ranges = [ranges[0] | prompt, ranges[0] | decode]
        else:
            frames = info.max_frames or MOST_FRAMES
            ranges[0] |= {"B": (1, 1, batch), "N": (1, 1, images), "F": (1, 1, frames), "nt": text(context)}
    elif "past" in inputs:
        painted = []  # not by a stage that is told of rows of images left out: painting then has one of its own
        if (flow := info.flow) and not set(POSITION_DELTAS) & set(inputs) and (before := context - flow.tokens) > 1:
            # A prompt of all samples, and an image after the row that tells the time (and the prompt, if fed with it).
            both, rows = (1, 2 * batch, 2 * batch), (flow.tokens,) * 3
            painted = [{"B": both, "nv": none, "nt": text(before - 1)}, {"B": both, "nv": (1, 1, before), "nt": rows}]
        ranges = [
            *painted,
            {"B": one, "nv": (0, min(info.tokens_per_image, visual), visual), "nt": text(context - visual)},
            {"B": one, "nv": none, "nt": text(context)},
            {"B": (1, batch, batch), "nv": none, "nt": one},
        ]
    else:
        if info.flow:  # both halves of the guidance, or a table of all steps at once
            batch = 2 * batch if {"latents", "hidden", "ids"} & set(inputs) else MOST_STEPS
        ranges = [{"B": (1, 1, batch), "n": text(context), "N": (1, 1, images), "nt": text(context)}]

    def shape(sizes: Iterable[int | str], which: int, r: dict[str, tuple[int, int, int]]) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else r[s][which] for s in sizes)

    return [{name: [shape(x.shape, i, r) for i in range(3)] for name, x in inputs.items()} for r in ranges]


def _check_stage(trt: Any, path: Path, name: str, stage: StageInfo, shapes: list, build: bool) -> list[Finding]:
    said: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = [Finding(name, e.node_name() or "?", e.node_operator() or "?", e.desc()) for e in errors]
        return found or [Finding(name, "?", "?", "; ".join(said) or "the parser gives no reason")]
    if not build:
        return []
    for i in range(network.num_layers):  # float32 attention has no kernel of its own; it may be taken apart
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    if any(isinstance(s, str) for x in stage.inputs.values() for s in x.shape):
        for wanted in shapes:
            profile = builder.create_optimization_profile()
            for input_name, (least, usual, largest) in wanted.items():
                profile.set_shape(input_name, least, usual, largest)
            config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        return [_build_finding(name, m, network) for m in said or ["the builder gives no reason"]]
    return []


def _build_finding(stage: str, message: str, network: Any) -> Finding:
    """A builder's message names a layer; layers are called after ONNX nodes."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.name and re.search(rf"(?<![\w/]){re.escape(layer.name)}(?![\w/])", message):
            return Finding(stage, layer.name, str(layer.type).removeprefix("LayerType."), message)
    return Finding(stage, "?", "?", message)
