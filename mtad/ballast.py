"""A target with ballast: a small model inside a large shape, which computes what it did before.

It is for measuring the price of a large target where there are no large weights: every pass
reads the bytes and does the operations of the large shape, and gives the small model's logits, so
that tokens and acceptance are those of the real pair. It says nothing of a large model's texts.

How the function stays, with n the target's width and H that of the shape:

- The stream is the target's in its first n columns and exactly zero behind them. Norm weights
  are multiplied by √(n/H) and epsilon by n/H, so that a norm over H gives what one over n gave.
- A head of size d sits in one of size D with its rotary pair i at place i·D/d: there the shape's
  own frequencies, of the same base, are the target's. Queries are multiplied by √(D/d), as the
  score is divided by √D. A key-value head that serves more queries than one of the shape can is
  there several times.
- All the rest is noise, so that the bits that move look like those of real weights, except where
  it would show: values of other heads and half of each other gated unit are read from the columns
  that are zero, and are zero. Layers beyond the target's come last and have nothing but such
  heads and units, so that the stream passes through them unchanged.

In float32 the logits differ by rounding only; in bfloat16 by as much as two ways to round the
same weights do. The vocabulary is the target's, and a tied head stays tied: a pass reads the
head's V·H weights once either way. Unlike in a large model, many of the numbers that the weights
meet are zeros, so that joules may come out somewhat low.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mtad import inspection, loading
from mtad.errors import ConfigError, PairError
from mtad.fields import FieldCheck
from mtad.wheel import Progress, report

_MAX_SIZE = 65_536
# The usual spread of weights before training: what is computed from noise stays small.
_NOISE_STD = 0.02
# A prime, so that rows of a matrix do not repeat. Drawing every weight anew would take minutes
# on a CPU, and no price depends on it.
_NOISE_VALUES = 4_194_301
# Their frequencies depend on the base and the place alone, so that heads of another size have
# the target's among their own.
_SPREADABLE_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class BallastShape:
    """The shape of a Llama without its vocabulary.

    Attributes:
        id: what the shape is called.
        layers: decoder layers.
        width: of the residual stream; divides into `heads`.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: size of a head, even.
        mlp: width of the gated MLP.
        note: which model has this shape, and what is different.

    Raises:
        ConfigError: names the field, the value and the allowed range.
    """

    id: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    note: str = ""

    def __post_init__(self) -> None:
        check = FieldCheck(self, "shape")
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "mlp"):
            check.whole(name, 1, _MAX_SIZE)
        if self.width % self.heads:
            check.refuse("heads", self.heads, f"a divisor of width ({self.width})")
        if self.heads % self.kv_heads:
            check.refuse("kv_heads", self.kv_heads, f"a divisor of heads ({self.heads})")
        if self.head_dim % 2:
            check.refuse("head_dim", self.head_dim, "even")

    def check_holds(self, config: Any) -> None:
        """Refuses a Llama that does not fit into this shape, given its configuration.

        Raises:
            ConfigError: names the field, the value and the least that it must be.
            PairError: the rotary positions cannot be spread over heads of another size.
        """
        check = FieldCheck(self, "shape")
        check.whole("layers", config.num_hidden_layers, _MAX_SIZE)
        check.whole("width", config.hidden_size, _MAX_SIZE)
        check.whole("mlp", config.intermediate_size, _MAX_SIZE)
        size = int(config.head_dim)
        if self.head_dim % size:
            check.refuse("head_dim", self.head_dim, f"a multiple of {size}, the target's")
        served, copies = _queries_served(config), _copies(config, self)
        least = copies * config.num_key_value_heads
        if self.kv_heads < least:
            allowed = (
                f"at least {least}: one of the target's {config.num_key_value_heads} serves"
                f" {served} queries, one of the shape's {self.heads // self.kv_heads}, so that"
                f" each is there {copies} times"
            )
            check.refuse("kv_heads", self.kv_heads, allowed)
        kind = config.rope_parameters["rope_type"]
        if self.head_dim != size and kind not in _SPREADABLE_ROPES:
            raise PairError(
                f"The target's rope_type is {kind!r}, but must be one of"
                f" {', '.join(_SPREADABLE_ROPES)} for heads of another size than its own. Give the"
                f" shape head_dim={size}."
            )


_ALL = (
    # id, layers, width, heads, key-value heads, size of a head, MLP
    BallastShape(
        *("1b", 30, 2048, 32, 8, 64, 4096),
        note="Width and heads of Llama-3.2-1B; 30 layers with an MLP of 4,096 in place of its 16"
        " with one of 8,192. Beside the vocabulary 1.07 billion parameters, not 0.97.",
    ),
    BallastShape(
        *("8b", 32, 4096, 32, 8, 128, 14_336),
        note="Llama-3.1-8B with the target's vocabulary; beside it 6.98 billion parameters.",
    ),
    BallastShape(
        *("13b", 40, 5120, 40, 40, 128, 13_824),
        note="Llama-2-13B with the target's vocabulary; beside it 12.69 billion parameters.",
    ),
)
SHAPES: Mapping[str, BallastShape] = MappingProxyType({shape.id: shape for shape in _ALL})


def ballast(
    target: PreTrainedModel,
    shape: str | BallastShape,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """A model of a large shape with the function of a small one.

    It is allocated where it will stand and filled there, layer by layer; no second copy of it
    exists at any time. The target is only read.

    Args:
        target: a Llama that fits into the shape.
        shape: an id of `SHAPES`, or a shape.
        device: where the model goes; None for the target's.
        dtype: of its weights; None for the target's. From a float32 target the weights of a
            bfloat16 model are rounded once, from a bfloat16 target twice.
        seed: of the noise. The global generators are left as they were.
        progress: called with "ballast", the bytes filled and the bytes in all.

    Raises:
        ConfigError: the target does not fit into the shape; or shape, device or dtype is not one
            of the allowed.
        PairError: the target is no Llama, or there is not enough memory.
    """
    chosen = find_shape(shape)
    if not isinstance(target, LlamaForCausalLM):
        raise PairError(
            f"The target is a {type(target).__name__}, but must be a LlamaForCausalLM to be given"
            " ballast. Choose a pair with a Llama as its target, such as smollm2."
        )
    chosen.check_holds(target.config)
    place = inspection.device_of(target) if device is None else loading.resolve_device(device)
    kind = target.dtype if dtype is None else loading.resolve_dtype(dtype, place)
    model = _allocate(target, chosen, place, kind)
    _fill(model, target, _Seats.of(target.config, chosen, place), seed, progress)
    return model


def find_shape(shape: str | BallastShape) -> BallastShape:
    """A shape, or that of an id.

    Raises:
        ConfigError: there is no such shape.
    """
    if isinstance(shape, BallastShape):
        return shape
    if not isinstance(shape, str) or shape not in SHAPES:
        allowed = ", ".join(f'"{name}"' for name in SHAPES)
        raise ConfigError(
            f"shape is {str(shape)[:60]!r}, but must be one of {allowed}, or a BallastShape."
        )
    return SHAPES[shape]


def title(shape: BallastShape) -> str:
    """What stands behind the name of a target that has it."""
    name = shape.id.upper()
    return f"in {'an' if name.startswith('8') else 'a'} {name} shape (ballast)"


def _queries_served(config: Any) -> int:
    """By one key-value head of a target."""
    return int(config.num_attention_heads // config.num_key_value_heads)


def _copies(config: Any, shape: BallastShape) -> int:
    """How often each key-value head of a target is needed in a shape."""
    return math.ceil(_queries_served(config) * shape.kv_heads / shape.heads)


@dataclass(frozen=True)
class _Seats:
    """Which rows of a shape's projections hold which rows of the target's.

    Attributes:
        query: [heads·d] the large rows of q (and columns of o), one for each small row.
        key: [kv_heads·copies·d] the large rows of k and v.
        key_from: as long: the small row of each.
        heard: columns of o at which values of the target's arrive, also for queries that are
            none of its.
        taken: number of large q rows in groups that hold heads of the target.
    """

    query: Tensor
    key: Tensor
    key_from: Tensor
    heard: Tensor
    taken: int

    @staticmethod
    def of(config: Any, shape: BallastShape, device: torch.device) -> _Seats:
        size, kv_heads = int(config.head_dim), config.num_key_value_heads
        served, group = _queries_served(config), shape.heads // shape.kv_heads
        copies = _copies(config, shape)
        pairs = torch.arange(size // 2, device=device) * (shape.head_dim // size)
        inside = torch.cat([pairs, pairs + shape.head_dim // 2])

        def rows(heads: Tensor, stride: int, within: Tensor) -> Tensor:
            return (heads.unsqueeze(1) * stride + within).flatten()

        head = torch.arange(config.num_attention_heads, device=device)
        seat, nth = head // served * copies + head % served // group, head % served % group
        key_seat = torch.arange(kv_heads * copies, device=device)
        taken = kv_heads * copies * group
        return _Seats(
            rows(seat * group + nth, shape.head_dim, inside),
            rows(key_seat, shape.head_dim, inside),
            rows(key_seat // copies, size, torch.arange(size, device=device)),
            rows(torch.arange(taken, device=device), shape.head_dim, inside),
            taken * shape.head_dim,
        )


class _Noise:
    """An endless tape of random values: a block of them, again and again."""

    def __init__(self, like: Tensor, seed: int) -> None:
        generator = torch.Generator(like.device).manual_seed(seed)
        block = torch.empty(_NOISE_VALUES, dtype=like.dtype, device=like.device)
        self._block = block.normal_(std=_NOISE_STD, generator=generator)
        self._at = 0

    def fill(self, weight: Tensor) -> None:
        """Lays the next values of the tape over a weight."""
        rest = weight.view(-1)
        while rest.shape[0]:
            part = self._block[self._at : self._at + rest.shape[0]]
            rest[: part.shape[0]] = part
            rest = rest[part.shape[0] :]
            self._at = (self._at + part.shape[0]) % _NOISE_VALUES


def _allocate(
    target: LlamaForCausalLM, shape: BallastShape, device: torch.device, dtype: torch.dtype
) -> LlamaForCausalLM:
    """A model of the shape whose weights are not written yet."""
    small = target.config
    config = type(small).from_dict(
        {
            **small.to_dict(),
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.width,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.mlp,
            "rms_norm_eps": small.rms_norm_eps * small.hidden_size / shape.width,
            "dtype": dtype,
        }
    )
    config._attn_implementation = small._attn_implementation
    config._name_or_path = f"{inspection.model_info(target).name} {title(shape)}"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    needed, free = _bytes(model), loading.free_bytes(device)
    if free is not None and needed > free:
        raise PairError(
            f"The shape {shape.id!r} needs {needed / 1e9:.1f} GB in {loading.dtype_name(dtype)},"
            f" but {device.type} has {free / 1e9:.1f} GB free. Choose a smaller shape, another"
            " device, or a smaller dtype."
        )
    with loading.explained(f"The shape {shape.id!r}", device, dtype):
        model.to_empty(device=device)
    model.tie_weights()
    # Positions are no weights: they are computed, in float32 whatever the dtype.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.generation_config = copy.deepcopy(target.generation_config)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _fill(
    model: LlamaForCausalLM,
    target: LlamaForCausalLM,
    seats: _Seats,
    seed: int,
    progress: Progress | None,
) -> None:
    """Writes every weight of the model."""
    total, done = _bytes(model), 0
    report(progress, "ballast", done, total)
    embedding = model.model.embed_tokens
    noise = _Noise(embedding.weight, seed)
    width = target.config.hidden_size
    shrink = math.sqrt(width / model.config.hidden_size)
    embedding.weight.zero_()
    embedding.weight[:, :width] = _as(embedding.weight, target.model.embed_tokens.weight)
    if model.lm_head.weight is not embedding.weight:
        noise.fill(model.lm_head.weight)
        model.lm_head.weight[:, :width] = _as(embedding.weight, target.lm_head.weight)
    _embed_norm(model.model.norm, target.model.norm, shrink)
    layers = model.model.layers
    done = total - _bytes(layers)
    for layer, source in itertools.zip_longest(layers, target.model.layers):
        report(progress, "ballast", done, total)
        _fill_layer(layer, noise, width, shrink)
        if source is not None:
            _embed_layer(layer, source, seats, shrink)
        done += _bytes(layer)
    report(progress, "ballast", done, total)


def _fill_layer(layer: Any, noise: _Noise, width: int, shrink: float) -> None:
    """Makes a layer that leaves a stream alone which is zero behind its first columns."""
    for linear in (*layer.self_attn.children(), *layer.mlp.children()):
        if isinstance(linear, nn.Linear):
            noise.fill(linear.weight)
            if linear.bias is not None:
                linear.bias.zero_()
    # What these two give is zero from here on, whatever stands behind them.
    layer.self_attn.v_proj.weight[:, :width] = 0
    layer.mlp.up_proj.weight[:, :width] = 0
    layer.input_layernorm.weight.fill_(shrink)
    layer.post_attention_layernorm.weight.fill_(shrink)


def _embed_layer(layer: Any, source: Any, seats: _Seats, shrink: float) -> None:
    """Puts a layer of the target into one that does nothing yet."""
    _embed_norm(layer.input_layernorm, source.input_layernorm, shrink)
    _embed_norm(layer.post_attention_layernorm, source.post_attention_layernorm, shrink)

    ours, theirs = layer.self_attn, source.self_attn
    stream = torch.arange(theirs.q_proj.in_features, device=seats.query.device)
    # No score comes from the places of a head that the target's does not fill.
    ours.q_proj.weight[: seats.taken, : stream.shape[0]] = 0
    sharpen = math.sqrt(ours.head_dim / theirs.head_dim)
    _embed(ours.q_proj, theirs.q_proj, seats.query, stream, scale=sharpen)
    _embed(ours.k_proj, theirs.k_proj, seats.key, stream, seats.key_from)
    _embed(ours.v_proj, theirs.v_proj, seats.key, stream, seats.key_from)
    ours.o_proj.weight[:, seats.heard] = 0
    _embed(ours.o_proj, theirs.o_proj, stream, seats.query)

    ours, theirs = layer.mlp, source.mlp
    units = torch.arange(theirs.gate_proj.out_features, device=stream.device)
    _embed(ours.gate_proj, theirs.gate_proj, units, stream)
    _embed(ours.up_proj, theirs.up_proj, units, stream)
    ours.down_proj.weight[:, : units.shape[0]] = 0
    _embed(ours.down_proj, theirs.down_proj, stream, units)


def _embed_norm(large: Any, small: Any, shrink: float) -> None:
    large.weight.fill_(shrink)
    large.weight[: small.weight.shape[0]] = _as(large.weight, small.weight, shrink)


def _embed(
    large: nn.Linear,
    small: nn.Linear,
    rows: Tensor,
    columns: Tensor,
    source: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """Writes a small projection, or those rows of it that `source` lists, into a large one."""
    chosen = slice(None) if source is None else source
    large.weight[rows.unsqueeze(1), columns] = _as(large.weight, small.weight, scale)[chosen]
    if small.bias is not None:
        large.bias[rows] = _as(large.bias, small.bias, scale)[chosen]


def _as(like: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """A weight times a number, rounded once, where `like` is."""
    return (weight.float() * scale).to(like)


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
