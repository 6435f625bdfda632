"""The acceptance rules on the kernels, against those in torch: the same verdict, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import mtad
from mtad import tree as trees
from mtad.decoders import mtad as joint
from mtad.decoders import mtad_tree, specinfer, speculative
from mtad.decoders.beams import Beams
from mtad.decoders.common import Proposal
from mtad.histories import History
from mtad.lm import CachedLM
from mtad.logits import TORCH_SEARCH, Logits
from mtad.native import library
from mtad.native.drafter import Results
from mtad.native.llama import NativeLlama
from mtad.native.rows import NATIVE_SEARCH, NativeSearch
from mtad.sampling import Uniforms, Warped, warp
from tests.models import tiny

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no C compiler on this machine"
)

VOCABULARY = 12
CONFIG = mtad.DecodeConfig(top_k=6, top_p=0.9)
SEEDS = range(60)


def rows(random: torch.Generator, count: int) -> Warped:
    """Rows of p with a top_p that leaves some of the six out."""
    found = warp(Logits(2 * torch.randn(count, VOCABULARY, generator=random)), CONFIG)
    if float(torch.rand((), generator=random)) < 0.1:
        found.logprobs[-1] = torch.nan
    return found


class Answering(NativeSearch):
    """Fails where the kernels leave a rule to torch: it would be compared with itself."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("joint_prefix", "kept_run", "joint_path", "walk"):
            return found

        def answer(*arguments: Any) -> Any:
            given = found(*arguments)
            assert given is not None, name
            return given

        return answer


OURS = Answering()


def by(search: Any, of: Warped) -> Warped:
    return dataclasses.replace(of, search=search)


def same(ours: Any, theirs: Any) -> None:
    """Tensors and tuples of them: equal, and of the same type and shape."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def drafted(random: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with their log q, and how many of them stand."""
    tokens = torch.randint(VOCABULARY, (size,), generator=random)
    logprobs = -torch.rand(size, generator=random) * 4
    real = torch.rand(size, generator=random) < 0.8
    odd = torch.rand(size, generator=random)
    logprobs = torch.where(odd < 0.03, torch.nan, torch.where(odd > 0.97, -torch.inf, logprobs))
    return tokens, logprobs, real


@pytest.mark.parametrize("size", [0, 1, 4, 9])
def test_a_joint_prefix_is_that_of_torch(size: int) -> None:
    lengths = set()
    for seed, threshold in itertools.product(SEEDS, (0.01, 0.3, 2.0)):
        random = torch.Generator().manual_seed(seed)
        target, (tokens, logprobs, real) = rows(random, size + 1), drafted(random, size)
        likely = target.token_ids[:size, 0]  # else long prefixes are none of p's
        tokens = torch.where(torch.rand(size, generator=random) < 0.9, likely, tokens)
        for known in (real, None):
            block = Proposal.block(tokens, logprobs, size - 1, real=known)
            ours, theirs = (
                joint.joint_prefix(by(search, target), block, threshold)
                for search in (OURS, TORCH_SEARCH)
            )
            same(ours, theirs)
            lengths.add(int(ours[1]))
    assert len(lengths) > size / 2


@pytest.mark.parametrize("size", [0, 1, 4, 9])
def test_a_kept_run_is_that_of_torch(size: int) -> None:
    lengths = set()
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        target, (tokens, logprobs, _) = rows(random, size + 1), drafted(random, size)
        uniform = torch.rand(size, generator=random, dtype=torch.float64)
        uniform[: seed % 3] = 0.0
        tokens = torch.where(uniform < 0.8, target.token_ids[:size, 0], tokens)
        block = Proposal.block(tokens, logprobs, size - 1)
        ours, theirs = (
            speculative.kept_run(by(search, target), block, uniform)
            for search in (OURS, TORCH_SEARCH)
        )
        # Two libraries' exponentials differ in the last places.
        torch.testing.assert_close(ours[1], theirs[1], rtol=5e-16, atol=0, equal_nan=True)
        same((ours[0], ours[2]), (theirs[0], theirs[2]))
        lengths.add(int(ours[2]))
    assert lengths >= {0, size, size // 2}


def grown_tree(random: torch.Generator, width: int, depth: int) -> tuple[Tensor, Tensor]:
    """Parents [W·γ] and paths [W·γ, γ] of a tree whose levels have W nodes."""
    parents: list[int] = [-1] * width
    paths = torch.full((width * depth, depth), -1)
    for node in range(width * depth):
        if node >= width:
            slot = int(torch.randint(width, (), generator=random))
            parents.append(node // width * width - width + slot)
            paths[node] = paths[parents[node]]
        paths[node, node // width] = node
    return torch.tensor(parents), paths


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (1, 4), (4, 1), (3, 3)])
def test_a_joint_path_is_that_of_torch(width: int, depth: int) -> None:
    lengths = set()
    for seed, threshold in itertools.product(SEEDS, (1e-4, 0.05, 2.0)):
        random = torch.Generator().manual_seed(seed)
        parents, paths = grown_tree(random, width, depth)
        size = width * depth
        target, (tokens, logprobs, real) = rows(random, size + 1), drafted(random, size)
        if seed % 4 == 0:
            tokens[width - 1] = tokens[0]  # a tie
        reference = -3 * torch.rand(depth, generator=random)
        tree = Proposal(tokens, logprobs, depth - 1, depth, parents, real)
        ours, theirs = (
            mtad_tree.joint_path(by(search, target), tree, reference, paths, threshold)
            for search in (OURS, TORCH_SEARCH)
        )
        same(ours, theirs)
        lengths.add(int(ours[1]))
    assert lengths >= {0, depth} and len(lengths) > depth / 2


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3,), (2, 2), (1, 3, 2)])
def test_a_walk_is_that_of_the_host(shape: tuple[int, ...], replacement: bool) -> None:
    """Also where children are missing, occur twice, or are none of the target's tokens."""
    config = dataclasses.replace(CONFIG, replacement=replacement)
    lengths, corrected = set(), 0
    for seed in SEEDS:
        random = torch.Generator().manual_seed(seed)
        parents, level = [], [-1]
        for children in shape:
            first = len(parents)
            parents += [node for node in level for _ in range(children)]
            level = list(range(first, len(parents)))
        size, expanded = len(parents), 1 + len(parents) - len(level)
        draft = rows(random, expanded)
        target = rows(random, size + 1)
        if seed % 3 == 0:  # nothing is left of p where q is the same
            target = target.with_(
                *(
                    torch.cat([like[:expanded], own[expanded:]])
                    for like, own in (
                        (draft.token_ids, target.token_ids),
                        (draft.logprobs, target.logprobs),
                    )
                )
            )
        above = torch.tensor(parents) + 1
        column = torch.randint(6, (size, 1), generator=random)
        tokens = draft.token_ids[above].gather(1, column).squeeze(1)
        logprobs = draft.logprobs[above].gather(1, column).squeeze(1)
        real = torch.rand(size, generator=random) < 0.9
        chain = max(shape) == 1
        tree = Proposal(
            *(tokens, logprobs, len(shape) - 1, len(shape)),
            *(None if chain else torch.tensor(parents), None if chain else real),
        )
        candidates = specinfer.Candidates(tree, draft)
        chance = torch.rand(size + 1, generator=random, dtype=torch.float64)
        ours, theirs = (
            specinfer.walk_down(candidates, by(search, target), chance, config)
            for search in (OURS, TORCH_SEARCH)
        )
        assert ours.tests == theirs.tests
        for name, value in vars(ours.verdict).items():
            torch.testing.assert_close(
                value,
                getattr(theirs.verdict, name),
                rtol=1e-13,
                atol=1e-15,
                equal_nan=True,
                msg=name,
            )
        length = int(ours.verdict.accepted)
        lengths.add(length)
        corrected += len(ours.tests) > length
    assert lengths == set(range(len(shape) + 1)) and corrected > 5


def test_types_that_the_kernels_do_not_read_are_left_to_torch() -> None:
    random = torch.Generator().manual_seed(0)
    target, (tokens, logprobs, real) = rows(random, 4), drafted(random, 3)
    p, nodes = (target.logprobs, target.token_ids), (tokens, None, logprobs, real)
    doubles = (target.logprobs.double(), target.token_ids)
    uniform, search = torch.rand(3, dtype=torch.float64), NATIVE_SEARCH
    assert search.joint_prefix(p, nodes, 0.0) is not None
    assert search.joint_prefix(doubles, nodes, 0.0) is None
    assert search.joint_prefix(p, (tokens, None, logprobs.double(), real), 0.0) is None
    wide = torch.zeros(4, 600), torch.zeros(4, 600, dtype=torch.int64)
    assert search.joint_prefix(wide, nodes, 0.0) is None
    assert search.kept_run(p, nodes, uniform.float()) is None
    assert search.walk(p, doubles, nodes, 3, torch.rand(4, dtype=torch.float64), True) is None


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_draft_makes_of_a_search_is_that_of_torch(width: int, steps: int) -> None:
    """The best block and the tree, with ties, dead slots and a NaN."""
    config = dataclasses.replace(CONFIG, top_k=3)
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        uniforms, beams = Uniforms(random), Beams.root(torch.device("cpu"))
        history: History[Beams] = History()
        for _ in range(steps):
            logits = 3 * torch.randn(beams.joint.shape[0], 9, generator=random)
            logits[0, 3] = torch.nan if seed == 7 else 0.0
            beams = beams.grow(logits, width, config, uniforms, lambda ids: ids % 4 == 0)
            history.append(beams)
        if seed % 3 == 0:
            beams.joint[-1] = beams.joint[0]
        results = Results(steps, width)
        for name, tensor in results.tensors.items():
            tensor.copy_(torch.cat([getattr(beams, name).flatten() for beams in history]))
        for waiting in (0, 2):
            same(tuple(results.best_block(waiting)), tuple(history.best_block(waiting)))
        same(tuple(results.tree()), tuple(history.tree()))


def test_a_tree_grows_as_in_torch() -> None:
    """Also below nodes that are there, and below a chain."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    passes = CachedLM(NativeLlama(tiny("llama", **sizes)))._passes
    for seed in range(40):
        random = torch.Generator().manual_seed(seed)
        ours = theirs = trees.chain_ancestors(seed % 4, torch.device("cpu")) if seed % 4 else None
        for count in (1, 3, 5):
            old = 0 if ours is None else ours.shape[0]
            parents = torch.tensor(
                [
                    int(torch.randint(-1, old + node, (), generator=random)) if old + node else -1
                    for node in range(count)
                ]
            )
            ours, positions = passes.grow_tree(ours, parents.int(), count, 17)
            theirs, expected = trees.grown(theirs, parents, count, 17)
            same((ours, positions), (theirs, expected))


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 1], [-1, 5]])
def test_a_parent_that_is_no_node_before_its_child_is_refused(parents: list[int]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    target = CachedLM(NativeLlama(tiny("llama", **sizes)))
    with pytest.raises(IndexError, match=re.escape(f"parents are {parents}, but each must be")):
        target.forward(torch.ones(len(parents), dtype=torch.int64), torch.tensor(parents))
