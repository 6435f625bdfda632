"""Tiny random models of several families for tests, and the real embedded pair.

The tiny models know nothing; they are only there so that caches, masks and positions are those
of the real families. They are float32, in eval mode, and the same seed gives the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

FAMILIES = ("llama", "opt", "qwen2", "gpt2", "gemma3")

# `initializer_range` is far above the usual 0.02: with it a width of 16 gives nearly uniform
# logits, on which acceptance rules could not be told apart.
_SPREAD = 0.6


def _llama_like() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": _SPREAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _config(
    family: str, vocab_size: int, overrides: dict[str, Any]
) -> transformers.PreTrainedConfig:
    if family == "llama":
        return transformers.LlamaConfig(**{**_llama_like(), "vocab_size": vocab_size, **overrides})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**_llama_like(), "vocab_size": vocab_size, **overrides})
    if family == "gemma3":
        values = {
            **_llama_like(),
            "head_dim": 4,
            "query_pre_attn_scalar": 4,
            "sliding_window": 512,
            # Gemma scales its embeddings up, so that it needs less to be as sharp as the others.
            "initializer_range": _SPREAD / 2,
            "vocab_size": vocab_size,
            **overrides,
        }
        return transformers.Gemma3TextConfig(**values)
    if family == "opt":
        values = {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": _SPREAD,
            "dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            # OPT's configuration takes no None here; the embedding row of the id becomes zero.
            "pad_token_id": 1,
            "vocab_size": vocab_size,
            **overrides,
        }
        return transformers.OPTConfig(**values)
    if family == "gpt2":
        values = {
            "n_embd": 16,
            "n_inner": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": _SPREAD,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "vocab_size": vocab_size,
            **overrides,
        }
        return transformers.GPT2Config(**values)
    raise ValueError(f"family is {family!r}, but must be one of {', '.join(FAMILIES)}")


_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": transformers.LlamaForCausalLM,
    "opt": transformers.OPTForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "gemma3": transformers.Gemma3ForCausalLM,
}


def tiny(
    family: str = "llama", vocab_size: int = 32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random causal model of 2 layers and width 16 that runs in about a millisecond.

    Args:
        family: one of `FAMILIES`.
        vocab_size: rows of the embedding and of the logits.
        seed: of the weights; the global generator is left as it was.
        overrides: fields of the family's configuration, such as `eos_token_id=3`.
    """
    config = _config(family, vocab_size, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CLASSES[family](config)
    return model.to(torch.float32).eval()


def load_real_pair() -> Any:
    """The embedded pair. Body of the session fixture `smollm2`; fetches on first use."""
    import mtad

    return mtad.load_pair("smollm2")
