"""What a Program and its engines know of a model: one frozen record, which passes replace and never edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmopt.spec.flow_plan import FlowPlan


@dataclass(frozen=True)
class Cross:
    """How text sees images that lie outside the text, through cross-attention; see `mmopt.spec.cross_mask`.

    tiles: tiles that one image becomes. tokens, width: shape of a tile. leading_text: what text before the first image
    gets, "nothing" (zeros) or "all_images" (attention to all tiles). merge_adjacent: images whose markers follow each
    other directly are seen together by the text after them. marker_resets: a marker that is fed while decoding makes
    its sample see the first image again.
    """

    tiles: int
    tokens: int
    width: int
    leading_text: str = "nothing"
    merge_adjacent: bool = False
    marker_resets: bool = False


@dataclass(frozen=True)
class Flow:
    """How a rectified flow generates images: noise at time 0, data at time 1, the velocity by the language model.

    latents: shape of one image's latents. tokens: tokens of the language model that they become, after one that tells
    the time. time_scale: times are given to the model as time * time_scale. steps, guidance: the reference's. compact:
    what a mask would hide does not lie in the cache. plan: the solver to use when nothing is asked for; plans: those
    that were fitted to this model.
    """

    latents: tuple[int, int, int]
    tokens: int
    time_scale: float = 1000.0
    steps: int = 30
    guidance: float = 2.0
    compact: bool = False
    plan: FlowPlan | None = None
    plans: tuple[FlowPlan, ...] = ()


@dataclass(frozen=True)
class Processing:
    """Settings of the image processor and of the chat template, as these read them."""

    image: dict[str, Any] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """A model as it was traced: ids, sizes and limits.

    dtype: of its weights when it was loaded. image_id: stands in a prompt for an image, image_marker in a text.
    tokens_per_image: what one image takes in the cache; image_embed_width: of the rows that the image stages make.
    batch, images, context: the most samples, images of a sample, and tokens of a cache. max_frames: of a video, None
    for no limit. cross: images outside the text, None where they lie among it. flow: of models that generate images.

    After visual tokens were pruned: position_delta positions of each image stay empty, cache_delta of its tokens are
    not in the caches of later layers, positions is how many the model has (None: as many as the cache has places).
    cross_kv: what the language model reads of images outside the text, by name "key" or "value".
    full_precision_stages: dtype -> stages that stay in float32; full_precision_values: inputs and outputs
    that do. plan: of the search that chose the passes.
    """

    family: str
    image_id: int
    vocab_size: int
    hidden_size: int
    tokens_per_image: int
    image_embed_width: int
    eos_ids: tuple[int, ...]
    batch: int
    images: int
    context: int
    dtype: str = "float32"
    image_marker: str = "<image>"
    bos_id: int | None = None
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    max_frames: int | None = None
    cross: Cross | None = None
    flow: Flow | None = None
    positions: int | None = None
    position_delta: int = 0
    cache_delta: int = 0
    cross_kv: dict[str, str] = field(default_factory=dict)
    full_precision_stages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    full_precision_values: tuple[str, ...] = ()
    processing: Processing = field(default_factory=Processing)
    plan: dict[str, Any] | None = None

    @property
    def image_fusion(self) -> str:
        """ "inline": images lie among the text; "cross_attention": outside it."""
        return "inline" if self.cross is None else "cross_attention"

    @property
    def required_cross(self) -> Cross:
        """`cross`, where images must lie outside the text."""
        if self.cross is None:
            raise ValueError(f"{self.family}: images lie among the text")
        return self.cross

    @property
    def required_flow(self) -> Flow:
        """`flow`. Raises ValueError for a model that generates no images."""
        if self.flow is None:
            raise ValueError(f"{self.family} generates no images")
        return self.flow
