"""Acceptance rules on the kernels: the tests of a whole draft in one call.

The same lines in torch are ten to thirty operations on a handful of numbers, and after a pass,
which drives their code out of a CPU's caches, each kind of them takes as long as a whole call here.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mtad.logits import Nodes, Rows
from mtad.native import abi, library
from mtad.native.memory import floats

# Up to here one call is dearer than its work, and torch makes ten.
NARROW = 512
_KINDS = torch.float32, torch.float32, torch.int64, torch.int64


class NativeRules:
    """See `mtad.logits.Rules`."""

    def joint_prefix(
        self, target: Rows, nodes: Nodes, log_threshold: float
    ) -> tuple[Tensor, Tensor] | None:
        """See `Rules.joint_prefix`."""
        offer = _offer(target, nodes)
        if offer is None:
            return None
        struct, logprobs, _held = offer
        accepted = torch.empty((), dtype=torch.int64)
        library.load().mtad_joint_prefix(ctypes.byref(struct), log_threshold, accepted.data_ptr())
        return logprobs, accepted

    def kept_run(
        self, target: Rows, nodes: Nodes, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Rules.kept_run`."""
        offer = _offer(target, nodes)
        if offer is None or uniform.dtype != torch.float64:
            return None
        struct, logprobs, _held = offer
        uniform = uniform.contiguous()
        ratios = torch.empty(uniform.shape, dtype=torch.float64)
        accepted = torch.empty((), dtype=torch.int64)
        library.load().mtad_kept_run(
            ctypes.byref(struct), uniform.data_ptr(), ratios.data_ptr(), accepted.data_ptr()
        )
        return logprobs, ratios, accepted

    def joint_path(
        self, target: Rows, nodes: Nodes, reference: Tensor, paths: Tensor, log_threshold: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Rules.joint_path`."""
        offer = _offer(target, nodes)
        levels = reference.shape[0]
        kinds = reference.dtype, paths.dtype
        if offer is None or not levels or kinds != (torch.float32, torch.int64):
            return None
        struct, logprobs, _held = offer
        reference, paths = reference.contiguous(), paths.contiguous()
        accepted = torch.empty((), dtype=torch.int64)
        path = torch.empty(levels, dtype=torch.int64)
        library.load().mtad_joint_path(
            *(ctypes.byref(struct), reference.data_ptr(), paths.data_ptr(), levels),
            *(log_threshold, accepted.data_ptr(), path.data_ptr()),
        )
        return logprobs, accepted, path

    def walk(
        self,
        target: Rows,
        draft: Rows,
        nodes: Nodes,
        levels: int,
        uniform: Tensor,
        replacement: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """See `Rules.walk`."""
        offer = _offer(target, nodes)
        drafted, draft_ids = (each.contiguous() for each in draft)
        kinds = drafted.dtype, draft_ids.dtype, uniform.dtype
        known = kinds == (torch.float32, torch.int64, torch.float64)
        if offer is None or not known or drafted.shape[1] > NARROW:
            return None
        struct, logprobs, _held = offer
        uniform = uniform.contiguous()
        path, tests = (torch.empty(levels, dtype=torch.int64) for _ in range(2))
        scores, thresholds = (torch.empty(logprobs.shape, dtype=torch.float64) for _ in range(2))
        accepted, final = (torch.empty((), dtype=torch.int64) for _ in range(2))
        library.load().mtad_walk(
            ctypes.byref(
                abi.Walk(
                    *(struct, drafted.data_ptr(), draft_ids.data_ptr(), drafted.shape[1]),
                    *(levels, replacement, uniform.data_ptr(), path.data_ptr()),
                    *(accepted.data_ptr(), tests.data_ptr(), scores.data_ptr()),
                    *(thresholds.data_ptr(), final.data_ptr()),
                )
            )
        )
        return logprobs, path, accepted, tests, scores, thresholds, final


def _offer(
    target: Rows, nodes: Nodes
) -> tuple[abi.Offer, Tensor, tuple[Tensor | None, ...]] | None:
    """Also log p [N], which a rule fills in, and what must live as long; None for other types."""
    logprobs, token_ids = (each.contiguous() for each in target)
    tokens, parents, drafted, real = (None if each is None else each.contiguous() for each in nodes)
    assert tokens is not None and drafted is not None
    kinds = logprobs.dtype, drafted.dtype, token_ids.dtype, tokens.dtype
    if kinds != _KINDS or (parents is not None and parents.dtype is not torch.int64):
        return None
    if real is not None and real.dtype is not torch.bool:
        return None
    if logprobs.dim() != 2 or logprobs.shape[1] > NARROW:
        return None
    found = floats(tokens.shape[0])
    struct = abi.Offer(
        *(tokens.shape[0], logprobs.shape[1], logprobs.data_ptr(), token_ids.data_ptr()),
        *(tokens.data_ptr(), None if parents is None else parents.data_ptr()),
        *(drafted.data_ptr(), None if real is None else real.data_ptr(), found.data_ptr()),
    )
    return struct, found, (logprobs, token_ids, tokens, parents, drafted, real)
