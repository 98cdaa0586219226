"""What the stages of several families are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmopt import ops


class Part(nn.Module):
    """A stage that is one function of the model."""

    def __init__(self, model: nn.Module, run: Callable):
        super().__init__()
        self.root, self.run = model, run

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
