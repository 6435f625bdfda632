"""What a pass of a loaded model reads and computes, for the roofline."""

from __future__ import annotations

from transformers import PreTrainedModel

from mtad import inspection
from mtad.bench.roofline import Shape
from mtad.hidden_draft import HiddenDraft
from mtad.native.draft import NativeDraft
from mtad.native.llama import NativeLlama
from mtad.pairs import ModelPair


def shape_of(
    model: PreTrainedModel,
    weight_bytes: int | None = None,
    cache_item_bytes: int | None = None,
) -> Shape:
    """The shape of a causal model.

    Args:
        model: where the numbers of its layers come from.
        weight_bytes: that an engine reads, where it keeps the weights in a form of its own.
        cache_item_bytes: of a number in its cache; those of a weight of the model by default.
    """
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    read = inspection.weight_bytes(model)
    item = model.dtype.itemsize
    return Shape(
        weight_bytes=read if weight_bytes is None else weight_bytes,
        parameters=read // item,
        layers=int(config.num_hidden_layers),
        query_size=heads * size,
        key_value_size=key_value_heads * size,
        cache_item_bytes=cache_item_bytes or item,
    )


def target_shape(pair: ModelPair) -> Shape:
    """Of a pair's target on its engine."""
    return shape_of(
        pair.target, pair.target_info.weight_bytes, _cache_item_bytes(pair.engine_target)
    )


def draft_shape(pair: ModelPair) -> Shape | None:
    """Of a pair's draft; None without one, and for a `Drafter` that does not say its size.

    Of one that does, only the weights are known: its limit is that of reading them.
    """
    draft, info = pair.draft, pair.draft_info
    if isinstance(draft, PreTrainedModel):
        weight_bytes = info.weight_bytes if info else None
        return shape_of(draft, weight_bytes, _cache_item_bytes(pair.engine_draft))
    if info is None or not info.weight_bytes:
        return None
    if not isinstance(draft, HiddenDraft):
        return Shape(info.weight_bytes, 0, 0, 0, 0, 0)
    config = draft.config
    return Shape(
        weight_bytes=info.weight_bytes,
        parameters=info.parameters + pair.draft_ends.head.numel(),
        layers=config.num_layers,
        query_size=config.hidden_size,
        key_value_size=config.hidden_size // config.num_heads * config.num_key_value_heads,
        cache_item_bytes=_cache_item_bytes(pair.engine_draft) or draft.norm.dtype.itemsize,
    )


def _cache_item_bytes(runnable: object) -> int | None:
    """Where an engine's cache has another type than the weights."""
    if isinstance(runnable, (NativeLlama, NativeDraft)):
        return runnable.model.cache_dtype.itemsize
    return None
