"""softmax over keys that a mask hides = softmax without them: rows that nobody sees are not fed.

The mask over the slots of a cache is known as soon as the prompt is. Rows that it hides are left out of the cache, the
rest keep their positions, and the graph loses the mask: its attention is plain causal attention again.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from mmopt.ir.attention_args import CachedAttention
from mmopt.ir.graph import CACHED_ATTENTION, Builder, rebuild
from mmopt.ir.program import Program
from mmopt.ir.stage import Stage
from mmopt.rewrite.loops import row_inputs
from mmopt.rewrite.pass_base import Pass, Report
from mmopt.spec.schedule import Call, Loop


class DropHiddenRows(Pass):
    def run(self, program: Program, report: Report) -> Program:
        made = program.copy()
        for name, stage in program.stages.items():
            masks = {n: mask for n in stage.graph.nodes if (mask := mask_of(n)) is not None}
            if not masks:
                continue
            names = {n: i for i, n in stage.input_nodes().items()}
            hidden = {names.get(m, "") for m in masks.values()}
            if (
                len(hidden) != 1
                or not (mask := hidden.pop())
                or any(u not in masks for u in stage.input_nodes()[mask].users)
            ):
                report.skip(name, "its mask is not one input that attention alone reads")
                continue
            if why := self.why_not(program, name, stage, mask):
                report.skip(name, why)
                continue
            made.stages[name] = without(stage, mask)
            made.schedules = made.schedules.replaced(
                image=tuple(self.compact(i, name, mask) for i in made.schedules.image)
            )
            made.schedules = made.schedules.replaced(
                text=tuple(self.compact(i, name, mask) for i in made.schedules.text)
            )
            if any(c.stage == name for c in program.schedules.image.calls()):
                assert made.info.flow is not None
                made.info = replace(made.info, flow=replace(made.info.flow, compact=True))
            report.did(f"{name}: {len(masks)} attentions lose a mask; rows hidden by it are left out of the cache")
        if not report.rewrites and not report.skipped:
            report.skip("program", "no attention on a cache has a mask")
        return made

    def why_not(self, program: Program, name: str, stage: Stage, mask: str) -> str | None:
        """None if one call feeds the prompt, others go on from it, and all that is read of its rows are the caches."""
        calls = [c for c in program.schedules.image.calls() if c.stage == name]
        if program.schedules.image and not calls and mask == "seen":
            return None  # it generates no images, and texts see all slots
        ahead = [c for c in calls if c.source("past") == "prompt.begin"]
        after = [c for c in calls if c.source("past") == "prompt.past"]
        found = row_inputs(stage)
        if isinstance(found, str):
            return found
        if any(c.source(mask) != "prompt.seen" or c.source("offset") != "prompt.offset" for c in calls):
            return "its mask or its positions are not those of the prompt"
        rows = [[s for i in found for s in c.sources(i) if s != "no_rows"] for c in ahead]
        if len(ahead) != 1 or not after or len(calls) != 1 + len(after) or rows != [["prompt.text"]]:
            return "rows that are hidden are fed in one call with others, at places that all samples share"
        made = {ahead[0].target(o): o for o in stage.outputs if o not in stage.inputs}
        for c in program.schedules.image.calls():
            for s in (s for i in program.stages[c.stage].inputs for s in c.sources(i)):
                if s in made:
                    return f"{c.stage} reads {made[s]} of the rows of the prompt"
        return None

    def compact(self, item: Call | Loop, stage: str, mask: str) -> Call | Loop:
        """Calls without the mask. Rows after the prompt begin where its seen rows end, and keep their positions."""
        if isinstance(item, Loop):
            return replace(item, body=tuple(self.compact(c, stage, mask) for c in item.body))  # type: ignore[misc]
        if item.stage != stage:
            return item
        rename = {k: v for k, v in item.rename.items() if k != mask}
        if rename.get("past") == "prompt.past":
            rename |= {"past": "prompt.end", "offset": "image.offset"}
        return replace(item, rename=rename)


def without(stage: Stage, mask: str) -> Stage:
    graph = rebuild(stage.graph, drop_mask)
    place = stage.inputs.index(mask)
    unused = [n for n in graph.nodes if n.op == "placeholder"][place]
    graph.erase_node(unused)
    return Stage(graph, [i for i in stage.inputs if i != mask], stage.outputs)


def mask_of(n: Node) -> Node | None:
    """The mask over the slots of a cache, if a node is attention that has one."""
    return CachedAttention.of(n).key_mask if n.target is CACHED_ATTENTION else None


def drop_mask(b: Builder, n: Node, args: tuple) -> Node | None:
    return None if mask_of(n) is None else b.copy(n, CachedAttention(*args)[:-1])  # the mask is the last argument
