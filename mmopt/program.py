"""Program: the stages of a model as graphs, the schedule that calls them, and the weights they share."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from mmopt import ops
from mmopt.graph import ARANGE, FULL, is_const, shape_of
from mmopt.media import Media
from mmopt.planning import Chunk, plan, told_of_images
from mmopt.schedule import Call as Call
from mmopt.schedule import Cat as Cat
from mmopt.schedule import Loop as Loop
from mmopt.schedule import calls_of


@dataclass
class Stage:
    """A graph with named inputs and outputs (in the order of its placeholders and output tuple)."""

    graph: Graph
    inputs: list[str]
    outputs: list[str]
    _constants: dict[Node, Any] = field(default_factory=dict, repr=False)
    _complete: bool = field(default=False, repr=False)  # every constant that is needed again is kept

    def placeholders(self) -> list[Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def input_nodes(self) -> dict[str, Node]:
        return dict(zip(self.inputs, self.placeholders(), strict=True))

    def output_nodes(self) -> dict[str, Node]:
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return dict(zip(self.outputs, out.args[0], strict=True))

    def weights(self) -> set[str]:
        return {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}

    def replaced(self, graph: Graph) -> Stage:
        return Stage(graph, self.inputs, self.outputs)

    def run(
        self,
        weights: dict[str, Tensor],
        values: dict[str, Tensor],
        keep_constants: bool = True,
        gradients: bool = False,
    ) -> dict[str, Tensor]:
        """Run in plain PyTorch. What depends on weights alone is computed once and kept.

        gradients: outputs can be differentiated by `values`. What was kept by other runs cannot, so a stage is either
        run with them or without.
        """
        sizes: dict[sympy.Symbol, int] = {}
        env: dict[Node, Any] = {}
        for name, node in self.input_nodes().items():
            if name not in values:
                raise KeyError(f"input {name!r} is missing")
            x = values[name]
            env[node] = x
            if x.dim() != len(shape_of(node)):
                raise ValueError(f"input {name}: expected shape {shape_of(node)}, got {tuple(x.shape)}")
            for wanted, got in zip(shape_of(node), x.shape, strict=True):
                if isinstance(wanted, sympy.Symbol):
                    wanted = sizes.setdefault(wanted, got)
                if wanted != got:
                    raise ValueError(f"input {name}: expected shape {shape_of(node)}, got {tuple(x.shape)}")
        last_use = {a: n for n in self.graph.nodes for a in n.all_input_nodes}
        with torch.enable_grad() if gradients else torch.inference_mode():
            for n in self.graph.nodes:
                if n.op == "get_attr":
                    env[n] = weights[str(n.target)]
                elif n.op == "call_function":
                    if n in self._constants:
                        env[n] = self._constants[n]
                    elif not (n.meta["const"] and self._complete):
                        env[n] = evaluate(n, env, sizes, plain=gradients)
                        if n.meta["const"] and keep_constants and any(not u.meta.get("const") for u in n.users):
                            self._constants[n] = env[n]
                elif n.op == "output":
                    self._complete |= keep_constants
                    return dict(zip(self.outputs, (env[a] for a in n.args[0]), strict=True))
                for a in n.all_input_nodes:
                    if last_use[a] is n:
                        env.pop(a, None)
        raise AssertionError("a graph ends with its output")


def evaluate(n: Node, env: dict[Node, Any], sizes: dict[sympy.Symbol, int], plain: bool = False) -> Any:
    """One operator on tensors, sizes put in for their symbols; plain: by definitions that have gradients."""

    def value(a: Any) -> Any:
        if isinstance(a, Node):
            return env[a]
        return int(a.subs(sizes)) if isinstance(a, sympy.Expr) else a

    args = torch.fx.node.map_aggregate(n.args, value)
    if n.target is operator.getitem:
        return args[0][args[1]]
    if n.target in (FULL, ARANGE):
        return n.target(*args, dtype=n.meta["dtype"])
    schema = n.target._schema.arguments  # keyword-only arguments stand in their place among the positional ones
    named = {a.name: v for a, v in zip(schema, args, strict=False) if a.kwarg_only}
    target = ops.PLAIN.get(n.target, n.target) if plain else n.target
    return target(*args[: len(args) - len(named)], **named)


@dataclass
class Program:
    """See the module docstring. ``program(prompts=..., pixel_values=...)`` runs it; ``print(program)`` shows it."""

    stages: dict[str, Stage]
    schedule: tuple[Call | Loop, ...]
    weights: dict[str, Tensor]
    state: dict[str, tuple[tuple, torch.dtype]]  # carried values that start as zeros: shape and dtype
    info: dict[str, Any]  # what plans and engines need: image id, rows per image, capacity, eos ids ...
    has_weights: bool = True
    painting: tuple[Call | Loop, ...] = ()  # a second schedule: from a prompt and noise to an image

    def copy(self) -> Program:
        """Another Program that shares weights and graphs; passes replace graphs, they never edit them."""
        return Program(
            dict(self.stages),
            self.schedule,
            dict(self.weights),
            dict(self.state),
            copy.deepcopy(self.info),
            self.has_weights,
            self.painting,
        )

    def with_stage(self, name: str, stage: Stage) -> Program:
        made = self.copy()
        made.stages[name] = stage
        return made

    def drop_unused(self) -> Program:
        """Without the weights that no stage reads."""
        made = self.copy()
        used = set().union(*(s.weights() for s in self.stages.values()))
        made.weights = {k: v for k, v in self.weights.items() if k in used}
        return made

    def calls(self) -> Iterator[Call]:
        yield from calls_of((*self.schedule, *self.painting))

    def __str__(self) -> str:
        from mmopt.text import program_text

        return program_text(self)

    def __call__(
        self,
        prompts: list[list[int]],
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 1,
        forced: Tensor | None = None,
        ignore_eos: bool = False,
        observe: Callable[[str, Call, dict[str, Tensor], Chunk | None], None] | None = None,
        images: list[int] | None = None,
        image_inputs: dict[str, Tensor] | None = None,
        before: list[int] | None = None,
        tiles: list[int] | None = None,
    ) -> dict[str, Any]:
        """Run the schedule: prompts are token ids with the image id where an image stands, images in order.

        pixel_values are images ``[N, 3, H, W]``, in families that take videos also ``[N, frames, 3, H, W]``.
        Returns the named values at the end, ``tokens`` (a list of new ids for each sample, the end id included) among
        them. `forced` ``[B, T]`` feeds these ids instead of the greedy ones. `observe` is called after each stage.
        `image_inputs`: what the image stages take beside pixel_values. Where images lie outside the text: `images` of
        each prompt, if not as many as its markers; `tiles` of each image that count; markers `before` each prompt.
        """
        if not self.has_weights:
            raise ValueError("this Program has shapes only, no weights: it can be optimized and inspected, not run")
        chunks = plan(prompts, self.info, max_new_tokens, images)
        wanted = sum(len(c.images) for c in chunks)
        given = 0 if pixel_values is None else len(pixel_values)
        if wanted > given:
            raise ValueError(f"the prompts have {wanted} image markers, but pixel_values holds {given} images")
        sizes = {"B": len(prompts)}
        values: dict[str, Any] = {
            k: torch.zeros([sizes.get(s, s) if isinstance(s, str) else s for s in shape], dtype=dtype)
            for k, (shape, dtype) in self.state.items()
        }
        values |= self._seen(len(prompts))
        values["images_read"] = torch.zeros(len(prompts), dtype=torch.int64)
        if pixel_values is not None:
            values["pixel_values"] = self.as_frames(pixel_values.to(self.info["torch_dtype"]))
            values |= image_inputs or {}
        media = None if self.info.get("cross") is None else Media(self, chunks, before, tiles)
        tokens: list[Tensor] = []
        for item in self.schedule:
            if media:
                media.lay_out(values)
            if isinstance(item, Call):
                if all(n in values for n in self.stages[item.stage].inputs):
                    self._call(item, values, "", observe, None)
            elif item.over == "chunks":
                for chunk in chunks:
                    self._chunk(item, chunk, values, observe, media)
            else:
                self._decode(item, values, tokens, max_new_tokens, forced, ignore_eos, observe, media)
        values["tokens"] = self._until_end(tokens, len(prompts), ignore_eos)
        return values

    def _seen(self, batch: int) -> dict[str, Tensor]:
        """Where the language model can leave slots of its cache out: it sees them all here, at their own positions."""
        slots = self.stages["language_model"].input_nodes() if self.painting else {}
        made = {"offset": torch.zeros(batch, dtype=torch.int64)} if "offset" in slots else {}
        if "seen" in slots:
            made["seen"] = torch.ones(batch, shape_of(slots["seen"])[1], dtype=torch.bool)
        return made

    def paint(
        self,
        prompts: list[list[int]],
        noise: Tensor,
        plan: Any = None,
        observe: Callable[[str, Call, dict[str, Tensor], Chunk | None], None] | None = None,
    ) -> dict[str, Any]:
        """Paint an image for each prompt (ids, the last of which gives way to the time) from its own noise.

        noise ``[G, c, h, w]`` float32; plan: a `mmopt.solvers.FlowPlan`, by default the reference's steps. Returns
        ``latents`` and, where the model has a decoder of images, ``image`` ``[G, 3, H, W]`` (about -1 to 1), also
        ``trajectory``: the latents after each evaluation.
        """
        from mmopt.painting import paint

        return paint(self, prompts, noise, plan, observe)

    def as_frames(self, pixel_values: Tensor) -> Tensor:
        """Images as videos of one frame, if the image stages take videos. ValueError if there are too many frames."""
        nodes = (s.input_nodes().get("pixel_values") for s in self.stages.values())
        wanted = next((shape_of(n) for n in nodes if n is not None), ())
        if len(wanted) < 2 or str(wanted[1]) != "F":
            return pixel_values
        if pixel_values.dim() == len(wanted) - 1:
            pixel_values = pixel_values[:, None]
        most = self.info.get("max_frames")
        if most is not None and pixel_values.shape[1] > most:
            raise ValueError(f"pixel_values have {pixel_values.shape[1]} frames, the model takes at most {most}")
        return pixel_values

    def _call(self, call: Call, values: dict, phase: str, observe, chunk: Chunk | None) -> None:
        stage = self.stages[call.stage]
        given = {n: values[call.source(n)] for n in stage.inputs}  # type: ignore[index]
        made = stage.run(self.weights, given)
        values.update({call.target(n): v for n, v in made.items()})
        if observe:
            observe(phase, call, made, chunk)

    def _chunk(self, loop: Loop, chunk: Chunk, values: dict, observe, media: Media | None) -> None:
        """One chunk of one sample: carried values are that sample's row of the batch, put back afterwards."""
        lane = slice(chunk.sample, chunk.sample + 1)
        local = {k: v[lane] if k in self.state else v for k, v in values.items()}
        width = self.info.get("row_width", self.info["hidden_size"])
        before = values["images_read"][lane].clone()
        values["images_read"][lane] += len(chunk.images)
        told = told_of_images(before, values["images_read"][lane].clone(), self.info)
        local |= {f"chunk.{k}": v for k, v in told.items()}
        if media:
            local |= media.of_chunk(chunk, values)
            visual = None
        elif chunk.images:
            if values["image_rows"].shape[1:] != (self.info["rows_per_image"], width):
                raise ValueError(
                    f"image_rows have shape {tuple(values['image_rows'].shape)}, expected (N, "
                    f"{self.info['rows_per_image']}, {width})"
                )
            visual = values["image_rows"][list(chunk.images)].reshape(1, -1, width)
        else:
            visual = torch.zeros(1, 0, width, dtype=self.info["torch_dtype"])
        local |= {"chunk.ids": torch.tensor([chunk.ids]), "chunk.visual": visual} | self._seen(1)
        for call in loop.body:
            self._call(call, local, "prefill", observe, chunk)
        for k in self.state:
            if local[k].shape[1:] != values[k].shape[1:]:  # logits: of as many rows as the chunk has; keep the last
                values[k][lane] = local[k][:, -1:]
            else:
                values[k] = values[k].clone()
                values[k][lane] = local[k]

    def _decode(
        self, loop: Loop, values: dict, tokens: list, trips: int, forced, ignore_eos: bool, observe, media: Media | None
    ) -> None:
        width = self.info.get("row_width", self.info["hidden_size"])
        values |= told_of_images(values["images_read"], values["images_read"], self.info)
        batch = values["logits"].shape[0]
        values["no_visual"] = torch.zeros(batch, 0, width, dtype=self.info["torch_dtype"])
        ended = torch.zeros(batch, 1, dtype=torch.bool)
        for trip in range(trips):
            for call in loop.body:
                if call.stage != loop.body[0].stage and (trip == trips - 1):
                    continue  # the last token is not fed back
                self._call(call, values, "decode", observe, None)
                if call.stage == loop.body[0].stage:
                    tokens.append(values["ids"])
                    ended = ended | values[loop.until]
                    if forced is not None:
                        values["ids"] = forced[:, trip : trip + 1]
                    if media and trip < trips - 1:
                        values |= media.of_step(values)
            if bool(ended.all()) and not ignore_eos and forced is None:
                break

    def _until_end(self, tokens: list[Tensor], batch: int, ignore_eos: bool) -> list[list[int]]:
        rows = torch.cat(tokens, 1).tolist() if tokens else [[] for _ in range(batch)]
        for row in rows if not ignore_eos else []:
            end = next((i for i, t in enumerate(row) if t in self.info["eos_ids"]), None)
            if end is not None:
                del row[end + 1 :]
        return rows


def live_constants(stage: Stage) -> list[Node]:
    """Constant nodes that something not constant reads (or that are outputs): what an engine has to store."""
    return [
        n
        for n in stage.graph.nodes
        if n.op in ("get_attr", "call_function") and is_const(n) and any(not u.meta.get("const") for u in n.users)
    ]
