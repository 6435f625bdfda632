"""The decoding methods, one file each, and the way to find them by id.

A decoder is a function `decode(target, draft, prompt_ids, config, generator)` that yields
the Outcome of each iteration. It never times, prints, detokenises or meters.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from mtad.catalogue import method_info
from mtad.config import DecodeConfig
from mtad.draft import Drafter
from mtad.lm import CachedLM
from mtad.trace import Outcome


class Decoder(Protocol):
    """The one function of a method's file."""

    def __call__(
        self,
        target: CachedLM,
        draft: Drafter | None,
        prompt_ids: Sequence[int],
        config: DecodeConfig,
        generator: torch.Generator,
        *,
        eos_token_ids: Sequence[int] = (),
    ) -> Iterator[Outcome]:
        """Decodes after `prompt_ids`, which are not empty, with caches that are."""


def load_decoder(method: str) -> Decoder:
    """The decode function of a method.

    Raises:
        ConfigError: there is no such method.
    """
    module = importlib.import_module(f"mtad.decoders.{method_info(method).id}")
    decoder: Decoder = module.decode
    return decoder
