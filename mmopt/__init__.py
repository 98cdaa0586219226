"""mmopt: a compiler for multimodal models. Load, trace, optimize, export, run, verify, measure.

Names are imported when they are first used: the engine needs neither torch nor onnx.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "mmopt.frontend.load",
    "from_config": "mmopt.frontend.load",
    "CheckpointError": "mmopt.models._weight_files",
    "trace": "mmopt.frontend.trace",
    "optimize": "mmopt.search.optimize",
    "default_passes": "mmopt.pipeline",
    "CompressVisualTokens": "mmopt.passes.compress_visual_tokens",
    "find_sites": "mmopt.pruning.apply",
    "export": "mmopt.exporters.onnx",
    "Engine": "mmopt.runtime.engine",
    "EngineError": "mmopt.spec.errors",
    "Program": "mmopt.ir.program",
    "Pass": "mmopt.rewrite.pass_base",
    "Report": "mmopt.rewrite.pass_base",
    "ContractError": "mmopt.rewrite.contracts",
    "verify": "mmopt.conformance.replay",
    "inspect": "mmopt.ir.inspect",
    "bench": "mmopt.measure.bench",
    "fit_flow_plan": "mmopt.flow.fit_program",
    "FlowPlan": "mmopt.spec.flow_plan",
    "DriftBudget": "mmopt.flow.frontier",
    "Task": "mmopt.measure.task",
    "QualityBudget": "mmopt.search.budget",
    "evaluate": "mmopt.measure.quality",
    "compare_scores": "mmopt.measure.statistics",
}
__all__ = [*sorted(_WHERE), "__version__"]

if TYPE_CHECKING:
    from mmopt.conformance.replay import verify as verify
    from mmopt.exporters.onnx import export as export
    from mmopt.flow.fit_program import fit_flow_plan as fit_flow_plan
    from mmopt.flow.frontier import DriftBudget as DriftBudget
    from mmopt.frontend.load import from_config as from_config
    from mmopt.frontend.load import load as load
    from mmopt.frontend.trace import trace as trace
    from mmopt.ir.inspect import inspect as inspect
    from mmopt.ir.program import Program as Program
    from mmopt.measure.bench import bench as bench
    from mmopt.measure.quality import evaluate as evaluate
    from mmopt.measure.statistics import compare_scores as compare_scores
    from mmopt.measure.task import Task as Task
    from mmopt.models._weight_files import CheckpointError as CheckpointError
    from mmopt.passes.compress_visual_tokens import CompressVisualTokens as CompressVisualTokens
    from mmopt.pipeline import default_passes as default_passes
    from mmopt.pruning.apply import find_sites as find_sites
    from mmopt.rewrite.contracts import ContractError as ContractError
    from mmopt.rewrite.pass_base import Pass as Pass
    from mmopt.rewrite.pass_base import Report as Report
    from mmopt.runtime.engine import Engine as Engine
    from mmopt.search.budget import QualityBudget as QualityBudget
    from mmopt.search.optimize import optimize as optimize
    from mmopt.spec.errors import EngineError as EngineError
    from mmopt.spec.flow_plan import FlowPlan as FlowPlan


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'mmopt' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    except ModuleNotFoundError as e:
        if e.name in ("torch", "onnx", "safetensors", "sympy"):
            raise ImportError(f"mmopt.{name} needs {e.name}: pip install 'mmopt[compile]'") from e
        raise
    globals()[name] = value
    return value
