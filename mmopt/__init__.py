"""mmopt: a compiler for multimodal models. Load, trace, optimize, export, run, verify, measure.

Names are imported when they are first used: the engine needs neither torch nor onnx.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "mmopt.checkpoint",
    "from_config": "mmopt.checkpoint",
    "CheckpointError": "mmopt.checkpoint",
    "trace": "mmopt.tracing",
    "optimize": "mmopt.pipeline",
    "export": "mmopt.exporters.onnx",
    "Engine": "mmopt.engine",
    "EngineError": "mmopt.engine",
    "Program": "mmopt.program",
    "Pass": "mmopt.rewriting",
    "Report": "mmopt.rewriting",
    "ContractError": "mmopt.contracts",
    "replay": "mmopt.cases",
    "inspect": "mmopt.inspection",
    "bench": "mmopt.benchmark",
    "fit_flow_schedule": "mmopt.flow_schedule",
    "FlowPlan": "mmopt.flow_plan",
    "Drift": "mmopt.flow_frontier",
    "Task": "mmopt.tasks",
    "Quality": "mmopt.budget",
    "quality": "mmopt.tasks",
    "paired": "mmopt.tasks",
}
__all__ = [*sorted(_WHERE), "__version__"]

if TYPE_CHECKING:
    from mmopt.benchmark import bench as bench
    from mmopt.budget import Quality as Quality
    from mmopt.cases import replay as replay
    from mmopt.checkpoint import CheckpointError as CheckpointError
    from mmopt.checkpoint import from_config as from_config
    from mmopt.checkpoint import load as load
    from mmopt.contracts import ContractError as ContractError
    from mmopt.engine import Engine as Engine
    from mmopt.engine import EngineError as EngineError
    from mmopt.exporters.onnx import export as export
    from mmopt.flow_frontier import Drift as Drift
    from mmopt.flow_plan import FlowPlan as FlowPlan
    from mmopt.flow_schedule import fit_flow_schedule as fit_flow_schedule
    from mmopt.inspection import inspect as inspect
    from mmopt.pipeline import optimize as optimize
    from mmopt.program import Program as Program
    from mmopt.rewriting import Pass as Pass
    from mmopt.rewriting import Report as Report
    from mmopt.tasks import Task as Task
    from mmopt.tasks import paired as paired
    from mmopt.tasks import quality as quality
    from mmopt.tracing import trace as trace


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
