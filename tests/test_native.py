"""The kernels: against float arithmetic, in every build that this processor runs, to the bit."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mtad
from mtad.decoders.beams import Beams
from mtad.decoders.speculative import corrected_or_bonus, draw_corrected_or_bonus
from mtad.errors import PairError
from mtad.lm import CachedLM
from mtad.logits import TORCH_SEARCH, Columns, Logits, Search
from mtad.native import abi, library
from mtad.native.linear import matrix
from mtad.native.llama import NativeLlama, unsupported_reason
from mtad.native.memory import Arena
from mtad.native.packing import CODES4, CODES8, FLOAT32, Packed, pack, unpack
from mtad.native.rows import NATIVE_SEARCH
from mtad.native.threads import Context, context, lent_threads
from mtad.processor import cpu_flags
from mtad.sampling import Uniforms, draw, recorded, warp
from tests.models import tiny

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no C compiler on this machine"
)

BUILDS: dict[str, tuple[str, ...] | None] = {"native": None, "plain": ()}
if platform.machine() == "x86_64" and {"avx2", "fma", "f16c"} <= cpu_flags():
    BUILDS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
VOCABULARY = 64


def with_four_bits(rows: int, columns: int) -> Tensor:
    """Weights of sixteen evenly spaced values a group, as a dequantised Q4_1 file has them."""
    codes = torch.randint(16, (rows, columns // 32, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # that format stretches from the least to the largest
    scales = torch.rand(rows, columns // 32, 1).half().float() + 0.5
    minima = torch.randn(rows, columns // 32, 1).half().float()
    return (codes * scales.half().float() + minima).view(rows, columns)


def rounded(x: Tensor) -> Tensor:
    """An input as the kernels see it: 8 bits in groups of 32."""
    groups = x.double().view(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (groups / scale).round() * scale, 0.0).view(x.shape)


def times(packed: Packed, x: Tensor, flags: tuple[str, ...] | None, threads: int = 2) -> Tensor:
    context = Context(threads, library.load(flags))
    out, weights = x.new_empty(x.shape[0], packed.rows), matrix(packed)
    pointers = ctypes.byref(weights), x.data_ptr(), out.data_ptr()
    assert not context.library.mtad_linear(context.pointer, *pointers, x.shape[0])
    return out


def tiny_llama(**changes: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": 1200,
        "initializer_range": 0.2,
    }
    return tiny("llama", **{**sizes, **changes})


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(1)
        yield


# Packing


def test_four_bits_are_taken_only_where_they_lose_nothing() -> None:
    small = with_four_bits(32, 96)
    packed = pack(small)
    assert packed.kind == CODES4
    assert torch.allclose(unpack(packed), small, rtol=0, atol=1e-5)
    spoilt = small.clone()
    spoilt[5, 40] += 0.3
    assert pack(spoilt).kind == pack(torch.randn(32, 96)).kind == CODES8


def test_eight_bits_are_within_half_a_step() -> None:
    weight = torch.randn(48, 64)
    steps = weight.view(48, 2, 32).abs().amax(-1, keepdim=True) / 127
    missed = (unpack(pack(weight)) - weight).view(48, 2, 32).abs()
    # The scale is a float16: an 11-bit error of at most 127 steps comes on top.
    assert bool((missed <= (0.5 + 127 / 2048) * steps).all())


def test_a_group_of_zeros_stays_zero() -> None:
    for kind in (None, CODES8, FLOAT32):
        assert not unpack(pack(torch.zeros(16, 64), kind)).any()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", [FLOAT32, CODES8], ids=["float32", "8 bits"])
def test_rows_that_are_written_are_those_that_are_packed(kind: int, build: str) -> None:
    weight = torch.randn(48, 96) * torch.logspace(-9, 3, 48).unsqueeze(1)
    weight[5, 32:64] = 0.0
    weight[6, :32] = torch.arange(32) / 2  # halves between two codes
    expected, made = pack(weight, kind), pack(torch.zeros(48, 96), kind)
    packed = matrix(made)
    for start, count in ((0, 17), (17, 1), (18, 30)):
        rows = weight[start : start + count].contiguous()
        library.load(BUILDS[build]).mtad_write_rows(
            ctypes.byref(packed), start, count, rows.data_ptr(), made.data.data_ptr()
        )
    assert torch.equal(made.data, expected.data)


# Products


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", [FLOAT32, CODES8, CODES4], ids=["float32", "8 bits", "4 bits"])
def test_products_are_those_of_the_unpacked_weights(kind: int, build: str) -> None:
    weight = with_four_bits(80, 160) if kind == CODES4 else torch.randn(80, 160)
    packed = pack(weight, FLOAT32 if kind == FLOAT32 else None)
    assert packed.kind == kind
    x = torch.randn(19, 160) * torch.logspace(-3, 3, 19).unsqueeze(1)
    x[3] = 0
    seen = x.double() if kind == FLOAT32 else rounded(x)
    expected = seen @ unpack(packed).double().T
    found = times(packed, x, BUILDS[build])
    size = seen.abs() @ unpack(packed).double().abs().T
    assert bool(((found - expected).abs() <= 1e-5 * size + 1e-30).all())


@pytest.mark.parametrize("kind", [FLOAT32, CODES8, CODES4])
def test_a_row_does_not_depend_on_its_neighbours_or_on_the_threads(kind: int) -> None:
    weight = with_four_bits(48, 96) if kind == CODES4 else torch.randn(48, 96)
    packed = pack(weight, FLOAT32 if kind == FLOAT32 else None)
    x = torch.randn(13, 96)
    together = times(packed, x, None)
    for row in range(13):
        assert torch.equal(times(packed, x[row : row + 1].clone(), None, 1)[0], together[row])
    assert torch.equal(times(packed, x, None, 3), together)


def test_extreme_inputs_round_as_they_should() -> None:
    packed = pack(torch.full((16, 32), 127.0))
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 127.0, -127.0
    assert torch.equal(times(packed, x, None), torch.zeros(1, 16))
    x[0] = -127.0
    for flags in BUILDS.values():
        # The largest sum of products that a group of codes can have.
        assert torch.allclose(times(packed, x, flags), torch.tensor(-32 * 127.0**2), rtol=1e-4)


# Whole models


@pytest.mark.parametrize("compiler", [name for name in ("gcc", "clang") if shutil.which(name)])
def test_every_compiler_here_takes_the_source_without_a_warning(
    compiler: str, tmp_path: Path
) -> None:
    for flags in (*filter(None, BUILDS.values()), ("-march=native",), ()):
        strict = (*library._FLAGS, "-Wall", "-Wextra", "-Werror", *flags)
        out = str(tmp_path / "kernels.so")
        subprocess.run([compiler, *strict, str(library.SOURCE), "-o", out, "-lm"], check=True)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 64},
        {"head_dim": 80},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_in_float32_logits_and_states_are_those_of_transformers(
    changes: dict[str, Any], build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = library.load(BUILDS[build])
    monkeypatch.setattr(library, "load", lambda: kernels)
    monkeypatch.setattr("mtad.native.threads._of_thread", threading.local())
    model = tiny_llama(**changes)
    ids = torch.randint(VOCABULARY, (37,))
    expected = model(ids[None], output_hidden_states=True)
    layers = (0, 2, 3)
    found = CachedLM(NativeLlama(model, exact=True)).forward(ids, layers=layers)
    assert torch.allclose(found.logits, expected.logits[0], atol=1e-4)
    states = torch.cat([expected.hidden_states[layer][0] for layer in layers], -1)
    assert found.hidden is not None and torch.allclose(found.hidden, states, atol=1e-4)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "8 bits"])
@pytest.mark.parametrize("size", [23, 67, 150])
def test_chain_tree_and_token_by_token_agree_to_the_bit(
    exact: bool, size: int, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = library.load(BUILDS[build])
    monkeypatch.setattr(library, "load", lambda: kernels)
    monkeypatch.setattr("mtad.native.threads._of_thread", threading.local())
    llama = NativeLlama(tiny_llama(), exact=exact)
    text = torch.randint(VOCABULARY, (size,))
    whole = CachedLM(llama).forward(text).logits
    single, grown = CachedLM(llama), CachedLM(llama)
    for place in range(size):
        assert torch.equal(single.forward(text[place : place + 1]).logits[0], whole[place])
        single.keep(1)
    # Three tokens as a path of a tree among other nodes, in two calls, kept, and gone on. Where 64
    # slots are attended to at a time, the path of the second size lies on both sides of the line.
    start = size - 5
    grown.prefill(text[:start])
    others = torch.randint(VOCABULARY, (5,))
    nodes = torch.stack([others[0], text[start], text[start + 1], others[1], others[2]])
    first = grown.forward(nodes, torch.tensor([-1, -1, 1, 0, 1]), levels=2).logits
    second = grown.forward(
        torch.stack([others[3], text[start + 2], others[4]]), torch.tensor([4, 2, 2]), levels=1
    ).logits
    path = torch.stack([first[1], first[2], second[1]])
    assert torch.equal(path, whole[start : start + 3])
    grown.keep(torch.tensor([1, 2, 6]))
    assert torch.equal(grown.forward(text[start + 3 :]).logits, whole[start + 3 :])
    grown.rollback(10)
    assert torch.equal(grown.forward(text[10:]).logits, whole[10:])


@pytest.mark.parametrize("build", BUILDS)
def test_a_cache_of_half_precision_holds_keys_and_values_rounded(
    build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From those too small for a half to those too large."""
    kernels = library.load(BUILDS[build])
    monkeypatch.setattr(library, "load", lambda: kernels)
    monkeypatch.setattr("mtad.native.threads._of_thread", threading.local())
    model, text = tiny_llama(), torch.randint(VOCABULARY, (32,))  # two blocks of keys
    attention = model.model.layers[0].self_attn
    assert NativeLlama(model).model.cache_dtype == torch.float16
    for scales in (torch.ones(1), torch.logspace(-9, 6, attention.v_proj.weight.shape[0])):
        attention.v_proj.weight.mul_(scales.unsqueeze(1))
        attention.k_proj.weight.mul_(scales.unsqueeze(1))
        wide, narrow = (NativeLlama(model, exact=True).model for _ in range(2))
        narrow.cache_dtype = torch.float16
        caches = wide.cache(), narrow.cache()
        one, other = (cache.forward(text, 0, 32).logits for cache in caches)
        for floats, halves in zip(*(cache.save(32) for cache in caches), strict=True):
            # What comes into the first layer is the same.
            assert halves.dtype == torch.float16 and torch.equal(halves[0], floats[0].half())
            tiny_ones = (halves[0] != 0) & (halves[0].abs() < 2**-14)
            assert bool(halves[0].isinf().any() and tiny_ones.any()) is (scales.shape[0] > 1)
        if scales.shape[0] == 1:
            assert one is not None and other is not None and not torch.equal(one, other)
            torch.testing.assert_close(one, other, atol=0.05, rtol=0)


def test_the_default_type_of_torch_changes_nothing() -> None:
    """transformers sets it for all threads while it loads a model in bfloat16."""
    llama, text = NativeLlama(tiny_llama()), torch.randint(VOCABULARY, (40,))
    expected = CachedLM(llama).forward(text).logits
    config = mtad.DecodeConfig(top_k=4)
    rows = warp(Logits(expected, search=NATIVE_SEARCH), config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = CachedLM(llama).forward(text).logits
        again = Logits(found, search=NATIVE_SEARCH)
        warped, sums = warp(again, config), again.log_sums()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and sums.dtype == torch.float32
    assert torch.equal(warped.token_ids, rows.token_ids)
    assert torch.equal(warped.logprobs, rows.logprobs)


def test_a_cache_that_grows_loses_nothing() -> None:
    llama = NativeLlama(tiny_llama(), exact=True)
    text = torch.randint(VOCABULARY, (1100,))
    lm = CachedLM(llama)
    lm.prefill(text[:1099])
    whole = llama.model.cache(slots=1100).forward(text, 0, 1100)
    assert whole.logits is not None
    assert torch.equal(lm.forward(text[1099:]).logits[0], whole.logits[-1])


def test_texts_in_lockstep_are_those_one_by_one() -> None:
    llama = NativeLlama(tiny_llama())
    texts = torch.randint(VOCABULARY, (5, 21))
    together = llama.model.cache(5, 21)
    steps = []
    for place in range(21):
        rows = together.forward(texts[:, place], place, 1, layers=(1, 3))
        assert rows.logits is not None and rows.tapped is not None
        steps.append(torch.cat([rows.logits, rows.tapped], -1))
    for text, found in zip(texts, torch.stack(steps, 1), strict=True):
        alone = CachedLM(llama).forward(text, layers=(1, 3))
        assert alone.hidden is not None
        assert torch.equal(torch.cat([alone.logits, alone.hidden], -1), found)


def test_rows_that_are_skipped_get_no_logits() -> None:
    llama = NativeLlama(tiny_llama())
    text = torch.randint(VOCABULARY, (9,))
    whole = llama.model.cache().forward(text, 0, 9, layers=(3,))
    for layers in ((), (3,)):
        cut = llama.model.cache().forward(text, 0, 9, layers=layers, skipped=7)
        assert whole.logits is not None and cut.logits is not None
        assert torch.equal(cut.logits, whole.logits[7:])
        assert cut.tapped is None or torch.equal(cut.tapped, whole.tapped)


def test_a_token_of_no_vocabulary_is_refused_before_anything_is_read() -> None:
    lm = CachedLM(NativeLlama(tiny_llama()))
    lm.prefill(torch.tensor([3, 4, 5]))
    for token in (-1, VOCABULARY, 2**40):
        with pytest.raises(IndexError, match=f"{token}.* from 0 to {VOCABULARY - 1}"):
            lm.forward(torch.tensor([1, token]))
    untouched = CachedLM(NativeLlama(tiny_llama()))
    untouched.prefill(torch.tensor([3, 4, 5]))
    text = torch.tensor([6, 7])
    assert torch.equal(lm.forward(text).logits, untouched.forward(text).logits)


def test_weights_lie_in_memory_that_asked_for_large_pages() -> None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("only Linux has them")
    arena = Arena()
    first = arena.place(torch.arange(100, dtype=torch.uint8))
    second = arena.place(torch.arange(50, dtype=torch.uint8))
    assert first.tolist() == list(range(100)) and second.tolist() == list(range(50))
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    large = arena.place(torch.ones(65 * 2**20, dtype=torch.uint8))
    assert bool(large.all()) and first.tolist() == list(range(100))
    flags = flags_of_memory(first.data_ptr())
    if flags is None:
        pytest.skip("this system does not say what it was asked for")
    assert "hg" in flags


def flags_of_memory(address: int) -> list[str] | None:
    """What Linux notes of the memory at an address."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    inside = False
    for line in lines:
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


# Wide rows


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("columns", "count"), [(64, 1), (1000, 10), (49_153, 10), (37, 37)])
def test_wide_rows_are_read_as_torch_reads_them(columns: int, count: int, build: str) -> None:
    values = (5 * torch.randn(3, columns + 3))[:, :columns]
    values[1] = values[1].round()  # many equal ones
    values[2, columns // 2] = torch.inf * -1
    context = Context(2, library.load(BUILDS[build]))
    best, sums = torch.empty(3, count), torch.empty(3)
    at = torch.empty(3, count, dtype=torch.int64)
    rows = abi.Rows(
        *(values.data_ptr(), columns + 3, 3, columns, count),
        *(best.data_ptr(), at.data_ptr(), sums.data_ptr()),
    )
    context.library.mtad_rows(context.pointer, ctypes.byref(rows))
    ordered = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(best, ordered.values[:, :count])
    assert torch.equal(at, ordered.indices[:, :count])
    torch.testing.assert_close(sums, values.logsumexp(-1), atol=2e-6, rtol=2e-6)


def test_a_nan_comes_first_and_spoils_the_sum() -> None:
    values = torch.randn(2, 100)
    values[0, [3, 77]] = torch.nan
    best, at, sums = NATIVE_SEARCH.best(values, 4)
    assert best[0, :2].isnan().all() and at[0, :2].tolist() == [3, 77]
    assert not best[0, 2:].isnan().any() and not best[1].isnan().any()
    for found in (sums, NATIVE_SEARCH.log_sums(values)):
        assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_corrects_a_draft_is_drawn_as_torch_draws_it(temperature: float) -> None:
    """At every accepted length, also where p and q are the same, or have no token in common."""
    config = mtad.DecodeConfig(top_k=6, top_p=0.9, temperature=temperature)
    corrected = 0
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        drafts = 2 * torch.randn(4, 24, generator=random)
        others = 2 * torch.randn(5, 24, generator=random)
        others[0], others[1] = drafts[0], -drafts[1]
        target, draft = warp(Logits(others, search=NATIVE_SEARCH), config), warp(drafts, config)
        for length in range(5):
            uniform = torch.rand((), generator=random, dtype=torch.float64)
            accepted = torch.tensor(length)
            last = corrected_or_bonus(target.row(accepted), draft, accepted)
            expected = TORCH_SEARCH.draw(last.logprobs, last.token_ids, uniform)
            found = draw_corrected_or_bonus(target, draft, accepted, uniform)
            assert found.shape == () and torch.equal(found, expected), (seed, length)
            plain = draw(target.row(accepted), uniform)
            corrected += int(found != plain)
    assert (corrected > 50) is (temperature > 0.0)  # without it p and q are single tokens


@pytest.mark.parametrize("chain", [True, False])
def test_a_trace_is_told_the_same_of_a_pass_by_torch(chain: bool) -> None:
    values = 3 * torch.randn(7, 90)
    rows = None if chain else torch.tensor([0, 2, 5, 6])
    tokens = torch.randint(90, (6 if chain else 3,))
    for accepted in range(tokens.shape[0] + 1):
        for final in (torch.tensor(17), torch.tensor([89])):
            for known in (0, 10):  # of each row's largest, before
                both = [Logits(values, search=search) for search in (NATIVE_SEARCH, TORCH_SEARCH)]
                for logits in both if known else ():
                    logits.best(known)
                ours, theirs = (
                    recorded(logits, 5, tokens, torch.tensor(accepted), final, rows)
                    for logits in both
                )
                shapes = (tokens.shape[0] + 1,), (tokens.shape[0] + 1, 5)
                assert [one.shape for one in ours] == [shapes[0], shapes[1], shapes[1]]
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(one, other)
    short = Logits(values, Columns.of(torch.arange(90) + 1, 91), search=NATIVE_SEARCH)
    assert NATIVE_SEARCH.record(short, 5, tokens, torch.tensor(0), torch.tensor(3), rows) is None


def test_draws_and_picks_are_those_of_torch() -> None:
    """Also on one row without a batch, of probability 0, and of double precision."""
    logprobs = (3 * torch.randn(6, 10)).log_softmax(-1)
    logprobs[1, 4:] = -torch.inf
    logprobs[2, 0] = -torch.inf
    token_ids = torch.stack([torch.randperm(50)[:10] for _ in range(6)])
    for uniform in (*torch.rand(50, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)):
        drawn = TORCH_SEARCH.draw(logprobs, token_ids, uniform)
        assert torch.equal(NATIVE_SEARCH.draw(logprobs, token_ids, uniform), drawn)
        for row in range(logprobs.shape[0]):
            of = logprobs, token_ids, torch.tensor(row), uniform[row]
            assert torch.equal(NATIVE_SEARCH.draw_row(*of), drawn[row])
            assert torch.equal(TORCH_SEARCH.draw_row(*of), drawn[row])
        wide = logprobs[3].double(), token_ids[3], uniform[3]
        assert torch.equal(NATIVE_SEARCH.draw(*wide), TORCH_SEARCH.draw(*wide))
        tokens = torch.where(uniform < 0.7, drawn, 99)
        picked = TORCH_SEARCH.pick(logprobs, token_ids, tokens)
        assert torch.equal(NATIVE_SEARCH.pick(logprobs, token_ids, tokens), picked)
        one = logprobs[0], token_ids[0], tokens[0]
        assert torch.equal(NATIVE_SEARCH.pick(*one), TORCH_SEARCH.pick(*one))


@pytest.mark.parametrize("top_p", [1.0, 0.88, 0.33, 1e-30])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-6])
def test_warp_is_that_of_torch(temperature: float, top_p: float) -> None:
    values = torch.randn(2, 3, 10).mul_(3).sort(dim=-1, descending=True).values
    values[0, 1] = 2.5  # a flat row; none of these masses ends at one of its tenths
    values[1, 2, 5:] = -torch.inf
    values[1, 0, 0] = torch.nan
    found = NATIVE_SEARCH.warp(values, temperature, top_p)
    expected = TORCH_SEARCH.warp(values.clone(), temperature, top_p)
    assert found[1, 0].isnan().all() and expected[1, 0].isnan().all()
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6, equal_nan=True)
    sums = found.exp().sum(-1)
    assert sums[1, 1:].tolist() == pytest.approx([1, 1], abs=1e-6)


def rows_of(head: str, values: torch.Tensor, search: Search) -> Logits:
    """Rows over 9 tokens, or over 9 of 16, or with one of the others copied into them."""
    proposed = torch.tensor([0, 2, 3, 5, 7, 8, 9, 12, 13])
    columns = None if head == "whole" else Columns.of(proposed, 16)
    logits = Logits(values, columns, search=search)
    if head == "short and a copy":
        copied = torch.full((values.shape[0],), 4)  # with a third of the mass
        logits = logits.mixed(copied, torch.full(copied.shape, -0.7))
    return logits


@pytest.mark.parametrize("head", ["whole", "short", "short and a copy"])
def test_choices_and_tokens_drawn_from_them_are_those_of_torch(head: str) -> None:
    config = mtad.DecodeConfig(top_k=4, top_p=0.8, temperature=0.7)
    values, uniforms = 3 * torch.randn(40, 9), torch.rand(40, dtype=torch.float64)
    theirs, ours = (rows_of(head, values, one) for one in (TORCH_SEARCH, NATIVE_SEARCH))
    expected, found = warp(theirs, config), warp(ours, config)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    torch.testing.assert_close(ours.log_sums(), theirs.log_sums())
    torch.testing.assert_close(ours.best(3), theirs.best(3))
    tokens = draw(expected, uniforms)
    sampled = NATIVE_SEARCH.sample(rows_of(head, values, NATIVE_SEARCH), 4, 0.7, 0.8, uniforms)
    assert sampled is not None
    drawn = tokens, expected.logprob_of(tokens), expected.token_ids, expected.logprobs
    torch.testing.assert_close(sampled, drawn)
    assert (sampled[3] == -torch.inf).any(), "nothing was filtered out"


@pytest.mark.parametrize("head", ["whole", "short", "short and a copy"])
@pytest.mark.parametrize("width", [1, 4, 13])
def test_a_step_of_beam_sampling_is_that_of_torch(width: int, head: str) -> None:
    """To the token, past ends of sequences and with slots that stay dead."""
    config = mtad.DecodeConfig(top_k=3, top_p=0.8)
    beams: list[Beams] = [Beams.root(torch.device("cpu"))] * 2
    uniforms = [Uniforms(torch.Generator().manual_seed(7)) for _ in beams]
    for step in range(6):
        values = 3 * torch.randn(beams[0].joint.shape[0], 9)
        for at, search in enumerate((TORCH_SEARCH, NATIVE_SEARCH)):
            logits = rows_of(head, values, search)
            record = 2 if head == "whole" else 0  # a draft's are not recorded
            beams[at] = beams[at].grow(
                logits, width, config, uniforms[at], lambda ids: ids % 4 == 0, record=record
            )
        ours, theirs = vars(beams[1]), vars(beams[0])
        living = beams[0].joint > -torch.inf
        assert torch.equal(beams[1].joint > -torch.inf, living) and living.any(), step
        for name in (name for name in ours if ours[name].numel()):
            torch.testing.assert_close(ours[name][living], theirs[name][living], msg=name)
    assert not beams[0].real[living].all(), "none of them ended early"


def test_a_nan_spoils_a_step_of_beam_sampling() -> None:
    values = torch.randn(1, 9)
    values[0, 5] = torch.nan
    config, uniforms = mtad.DecodeConfig(top_k=3), Uniforms(torch.Generator())
    logits = Logits(values, search=NATIVE_SEARCH)
    grown = Beams.root(values.device).grow(logits, 4, config, uniforms, lambda ids: ids < 0)
    assert grown.joint.isnan().all() and grown.logprobs.isnan().all()


# Threads


def test_threads_are_lent_to_the_kernels_by_one_thread_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []

    def look() -> None:
        seen.append(torch.get_num_threads())

    def elsewhere() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    try:
        with lent_threads():
            look()
            assert context().threads == 3
            elsewhere()
        look()
        elsewhere()
        assert context().threads == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3, 3, 3]


# What cannot be run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 8}, "heads of 8"),
        ({"intermediate_size": 90}, "widths of 64 and 90"),
        ({"vocab_size": 63}, "a vocabulary of 63"),
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"attention_bias": True}, "no biases"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
    ids=str,
)
def test_a_shape_that_the_kernels_do_not_know_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    model = tiny_llama(**changes)
    assert said in str(unsupported_reason(model))
    with pytest.raises(PairError, match=said):
        NativeLlama(model)


def test_without_a_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(PairError, match="no C compiler here. Install gcc or clang"):
        library.load.__wrapped__()


def test_a_compiler_that_fails_is_named_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("MTAD_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(PairError, match="could not be compiled with .*false.*choose another"):
        library.load.__wrapped__()
    assert not list((tmp_path / "kernels").iterdir())


def test_damaged_kernels_are_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if library.unavailable_reason() is not None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setenv("MTAD_HOME", str(tmp_path))
    kernels = tmp_path / "kernels"
    abandoned = kernels / "build-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "kernels.so").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    first = library.load.__wrapped__().mtad_kernels()
    (file,) = kernels.iterdir()
    whole, made = file.read_bytes(), file.stat().st_mtime_ns
    library.load.__wrapped__()
    assert file.stat().st_mtime_ns == made  # it is taken as it is
    for damaged in (b"", whole[:60_000], bytes([whole[0] ^ 1]) + whole[1:]):
        file.unlink()  # the process has the old one mapped
        file.write_bytes(damaged)
        assert library.load.__wrapped__().mtad_kernels() == first
        assert [one.read_bytes() for one in kernels.iterdir()] == [whole]
