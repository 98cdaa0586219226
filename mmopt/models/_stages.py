"""What the stages of several families are made of."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmopt.ir import ops


def only(model: nn.Module, *paths: str) -> nn.Module:
    """The model with none of its submodules but those at `paths`, by the same names: tracing takes time for all it has.

    Both share their weights. Stages that have both names of a shared weight call it the same. Raises AttributeError for
    a path that does not exist.
    """
    inner: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name, _, rest = path.partition(".")
        getattr(model, name)
        inner[name].append(rest)
    made = copy.copy(model)
    made._modules = {
        k: m if "" in inner[k] or m is None else only(m, *inner[k]) for k, m in model._modules.items() if k in inner
    }
    return made


class Part(nn.Module):
    """A stage that is one function of the model, of its submodules at `paths`."""

    def __init__(self, model: nn.Module, run: Callable, *paths: str):
        super().__init__()
        self.root, self.run = only(model, *paths), run

    def forward(self, *args: Tensor) -> Any:
        return self.run(self.root, *args)


def on_caches(
    c: Any,
    keys: list[Tensor],
    values: list[Tensor],
    past: Tensor,
    slopes: Tensor | None = None,
    seen: Tensor | None = None,
) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The self-attention ``attend(q, k, v)`` of each layer on top of its caches, see `ops.cached_attention`.

    c: the decoder's config. What the caches become is put into the lists `keys` and `values`.
    """

    def of_layer(i: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = c.num_attention_heads, c.num_key_value_heads
            out, keys[i], values[i] = ops.cached_attention(
                q, k, v, keys[i], values[i], past, *heads, slopes=slopes, key_mask=seen
            )
            return out

        return attend

    return [of_layer(i) for i in range(c.num_hidden_layers)]
