"""What a model says about itself: sizes, context, ends, and whether it can be used here.

Pure functions of one Hugging Face model (and of one tokenizer). They run no forward pass.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtad.errors import PairError
from mtad.trace import MAX_PROMPT_TOKENS, ModelInfo

# Their caches hold one key and value a token, so that dropping a token drops its entry. A
# sliding window is a matter of the mask: the cache itself can keep everything.
_ROLLS_BACK = {"full_attention", "sliding_attention"}
# A padded vocabulary ends at a multiple of a power of two; 256 is the largest in use. Beyond
# that, differences of up to 1 % occur between sizes of one family.
PADDING_TOKENS = 256
PADDING_SHARE = 0.01


def vocab_size(model: PreTrainedModel) -> int:
    """Columns of the logits, padding included."""
    return int(model.config.get_text_config().vocab_size)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids go in: that of the input embedding, also if layers are spread."""
    return _embedding(model).device


def context_length(model: PreTrainedModel) -> int:
    """Most tokens of prompt and answer together; the largest prompt allowed where unstated."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return MAX_PROMPT_TOKENS


def eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """End-of-sequence tokens: the generation config's, the config's without it, the tokenizer's."""
    generation = getattr(model.generation_config, "eos_token_id", None)
    if generation is None:
        generation = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = [generation] if isinstance(generation, int) else list(generation or ())
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(int(token) for token in ids))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one forward pass reads.

    Embeddings that are only looked up are left out: a row a token is nothing beside the rest.
    An embedding that is also the output head is read whole, once. All experts of a mixture
    count, since which ones a token takes is not known beforehand.
    """
    head = model.get_output_embeddings()
    read_whole = {_identity(parameter) for parameter in head.parameters()}
    looked_up = {
        _identity(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
    } - read_whole
    sizes = {_identity(p): p.numel() * p.element_size() for p in model.parameters()}
    return sum(size for key, size in sizes.items() if key not in looked_up)


def model_info(
    model: PreTrainedModel, name: str = "", revision: str = "", note: str = ""
) -> ModelInfo:
    """Name, revision and sizes of a model. A local folder gives its last part only.

    Args:
        model: the model.
        name: overrides the name that the model was loaded under.
        revision: overrides the commit that it was loaded from.
        note: passed on.
    """
    path = name or str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isabs(path) or os.path.isdir(path):
        path = os.path.basename(os.path.normpath(path))  # a trace is shown to others
    parameters = {_identity(p): p.numel() for p in model.parameters()}
    return ModelInfo(
        name=path or type(model).__name__,
        revision=revision or str(getattr(model.config, "_commit_hash", None) or ""),
        parameters=sum(parameters.values()),
        weight_bytes=weight_bytes(model),
        note=note,
    )


def cache_argument(model: PreTrainedModel) -> str | None:
    """What a model calls the cache that it is given; None if it takes none.

    transformers 5.24 renamed it; code that came with a model may keep the older name.
    """
    accepted = inspect.signature(type(model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def check_model(role: str, model: Any) -> None:
    """Refuses what cannot be decoded with caches that roll back.

    Args:
        role: "target" or "draft", for the message.
        model: what the user gave.

    Raises:
        PairError: names the model and the reason.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise PairError(
            f"The {role} is a {name}, but must be a Hugging Face causal language model, such as"
            " AutoModelForCausalLM.from_pretrained(...) gives."
        )
    if model.config.is_encoder_decoder:
        raise PairError(
            f"The {role} {name} is an encoder-decoder model. Choose a decoder-only model."
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _ROLLS_BACK
    if kinds or getattr(model, "_is_stateful", False):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "a recurrent state"
        raise PairError(
            f"The {role} {name} has {what}, whose cache cannot roll back to an accepted prefix."
            " Choose a model with plain attention layers."
        )
    accepted = inspect.signature(type(model).forward).parameters
    for what, taken in (
        ("cache", cache_argument(model) is not None),
        ("position_ids", "position_ids" in accepted),
    ):
        if not taken:
            raise PairError(
                f"The {role} {name} takes no {what}, so that its cache cannot roll back or hold a"
                " token tree. Choose a model such as Llama, OPT, Qwen or GPT-2."
            )
    if model.get_output_embeddings() is None:
        raise PairError(
            f"The {role} {name} has no language-model head. Load it with AutoModelForCausalLM."
        )
    if _embedding(model).is_meta:
        raise PairError(
            f"The {role} {name} has no weights (it is on the meta device). Load it with"
            " from_pretrained(...) on a device with enough memory."
        )


def check_vocabularies(target_size: int, draft_size: int) -> None:
    """Refuses sizes that differ by more than padding.

    Both models' logits are cut to the smaller size, which is right only if what is cut off is
    never used. Sizes may differ by 256 tokens, or by 1 % of the larger one if that is more.

    Raises:
        PairError: names both sizes and the limit.
    """
    limit = max(PADDING_TOKENS, int(PADDING_SHARE * max(target_size, draft_size)))
    if abs(target_size - draft_size) > limit:
        raise PairError(
            f"The target has a vocabulary of {target_size:,} tokens and the draft one of"
            f" {draft_size:,}. They may differ by padding only (here at most {limit:,}). Choose a"
            " draft of the target's family."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, common_size: int) -> None:
    """Refuses a common vocabulary that lacks tokens which the tokenizer can produce.

    Raises:
        PairError: names the highest id and the common size.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= common_size:
        raise PairError(
            f"The tokenizer uses ids up to {highest:,}, but the models have only {common_size:,}"
            " tokens in common. Choose a tokenizer and models that belong together."
        )


def check_same_tokens(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, common_size: int
) -> None:
    """Refuses two tokenizers that mean different tokens by the same id.

    An id that only one of them names is no conflict: the other never writes it.

    Raises:
        PairError: names the first id that differs and both its tokens.
    """
    ours = {index: token for token, index in target.get_vocab().items()}
    theirs = {index: token for token, index in draft.get_vocab().items()}
    for index in sorted(ours.keys() & theirs.keys()):
        if index < common_size and ours[index] != theirs[index]:
            raise PairError(
                f"The two models have different vocabularies: token {index} is {ours[index]!r} for"
                f" the target and {theirs[index]!r} for the draft. Choose a draft of the target's"
                " family."
            )


def _embedding(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def _identity(parameter: Tensor) -> tuple[int, int]:
    """Equal for two parameters that share their memory, as tied ones do."""
    pointer = parameter.data_ptr()
    return (pointer, parameter.numel()) if pointer else (id(parameter), -1)
