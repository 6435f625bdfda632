"""What the Method tab shows beside its prose: the drawn pass, the methods, models and machine.

The prose is assets/method.html. Knows no gradio; torch is imported only once a pair is there.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from mtad.catalogue import methods
from mtad.errors import MtadError
from mtad.presets import find_preset
from mtad.trace import Step, Trace
from mtad.ui.recordings import FOLDER, read_traces
from mtad.ui.steps import number, reference_logprobs, visible
from mtad.whatif import node_ratios

BIBTEX = """@inproceedings{qin2025optimized,
  title     = {Optimized Multi-Token Joint Decoding With Auxiliary Model for LLM Inference},
  author    = {Qin, Zongyue and Hu, Ziniu and He, Zifan and Prakriya, Neha and Cong, Jason
               and Sun, Yizhou},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2407.09722},
  url       = {https://arxiv.org/abs/2407.09722}
}
"""
_CONTEXT_CHARACTERS = 48


def still(source: Any) -> dict[str, Any]:
    """What does not change: the drawn pass, the methods, the citation."""
    return {"example": example(), "methods": method_table(), "bibtex": BIBTEX, **here(source)}


def here(source: Any) -> dict[str, Any]:
    """Models, machine and energy; as long as no pair is loaded, how far that is."""
    pair = source.pair
    if pair is None:
        line = source.status().line
        return {
            "ready": False,
            "energy": f"Known when the models are loaded: {line}.",
            "facts": [["models", [["", f"not loaded yet: {line}"]]]],
            "notes": [],
        }
    return {
        "ready": True,
        "energy": energy_line(str(pair.device)),
        "facts": facts(pair),
        "notes": list(pair.notes),
    }


def energy_line(device: str) -> str:
    """How energy is measured on a device of this machine, or why it cannot be. Asks the sensor."""
    from mtad.energy import probe

    try:
        return probe(device).describe()
    except MtadError as error:
        return str(error)


def facts(pair: Any) -> list[list[Any]]:
    """[title, [[name, value], …]] of target, draft, engine and machine."""
    found = [["Target", model_facts(pair.target_info, *licences(pair.name)[:1])]]
    if pair.draft_info is not None:
        found.append(["Draft", model_facts(pair.draft_info, *licences(pair.name)[1:])])
    runs = [["device", str(pair.device)], ["weights", pair.weights], ["engine", pair.engine]]
    for name, value in (
        ("context", getattr(pair, "context_length", None)),
        ("vocabulary", getattr(pair, "vocab_size", None)),
    ):
        if value:
            runs.append([name, f"{value:,} tokens"])
    found.append(["How they run", runs])
    found.append(["Machine and libraries", machine_facts(pair.device)])
    return found


def model_facts(info: Any, licence: str = "") -> list[list[str]]:
    """Name, sizes and origin of a model; what is not known is left out."""
    found = [["name", info.name]]
    if info.parameters:
        found.append(["parameters", f"{info.parameters / 1e6:,.1f} million"])
    if info.weight_bytes:
        found.append(["weights read a pass", f"{info.weight_bytes / 2**20:,.1f} MiB"])
    if licence:
        found.append(["licence", licence])
    if info.revision:
        found.append(["revision", info.revision])
    if info.note:
        found.append(["note", info.note])
    return found


def licences(name: str) -> tuple[str, ...]:
    """Of target and draft of a preset; empty for a pair that is none."""
    try:
        preset = find_preset(name)
    except MtadError:
        return ()
    target, _, draft = preset.license.partition("; draft ")
    return target, draft or target


def machine_facts(device: Any) -> list[list[str]]:
    """The processor or board, and the versions of what computes and draws."""
    import gradio
    import torch

    from mtad.bench.machine import machine_name, versions

    found = [["processor", machine_name(torch.device(str(device)))]]
    found += [[name, version] for name, version in versions().items()]
    found.append(["gradio", str(gradio.__version__)])
    return found


def method_table() -> list[dict[str, Any]]:
    """One row a method, in the order of the catalogue."""
    return [
        {
            "title": info.title,
            "id": info.id,
            "summary": info.summary,
            "lossless": info.lossless,
            "draft": info.uses_draft,
            "citation": info.citation,
        }
        for info in methods()
    ]


@functools.cache
def example() -> dict[str, Any] | None:
    """The shortest recorded pass whose ratio falls under log τ, comes back, and falls for good.

    None if no recording of this installation has one.
    """
    found = telling_passes()
    return drawing(*min(found, key=lambda one: len(one[1].node_texts))) if found else None


def telling_passes() -> list[tuple[Trace, Step]]:
    """Of all recordings; see `is_telling`."""
    traces = [trace for file in sorted(FOLDER.glob("*.jsonl")) for trace in read_traces(file)]
    return [
        (trace, step)
        for trace in traces
        if isinstance(trace, Trace) and trace.method == "mtad"
        for step in trace.steps
        if is_telling(step, trace)
    ]


def is_telling(step: Step, trace: Trace) -> bool:
    """An early dip that a later token rescues, and a token after that which is rejected."""
    decision = step.decision
    if not decision.tree.token_ids:
        return False
    ratios, accepted = node_ratios(decision), decision.accepted_length
    limit = math.log(trace.config.accept_threshold)
    drawn = all(math.isfinite(ratio) for ratio in ratios)
    return drawn and any(ratio <= limit for ratio in ratios[:accepted]) and accepted < len(ratios)


def drawing(trace: Trace, step: Step) -> dict[str, Any]:
    """A pass of `mtad` as the tab draws it, with the sentences that explain it."""
    decision = step.decision
    tree, accepted = decision.tree, decision.accepted_length
    limit = math.log(trace.config.accept_threshold)
    ratios = node_ratios(decision)
    texts = [visible(text) for text in step.node_texts]
    log_q = reference_logprobs(step)
    before = visible("".join(each.text for each in trace.steps[: step.index]))
    bonus = visible("".join(step.emitted_texts[accepted:]))
    dips = [k for k in range(accepted) if ratios[k] <= limit]
    rows, log_p = [], 0.0
    for k, text in enumerate(texts):
        log_p += tree.target_logprobs[k]
        rows.append(
            {
                "text": text,
                "accepted": k < accepted,
                "ratio": ratios[k] if math.isfinite(ratios[k]) else None,
                "passes": ratios[k] > limit,
                "cells": [number(log_p), number(log_q[k]), number(ratios[k])],
            }
        )
    sentences = [
        f"The draft proposes {len(texts)} tokens: {_quoted(''.join(texts))}.",
        *[
            f"With {_quoted(texts[k])} the joint ratio falls to {number(ratios[k])}, under"
            f" log τ = {number(limit)}. That alone ends nothing."
            for k in dips
        ],
        f"{_quoted(texts[accepted - 1])} brings it back to {number(ratios[accepted - 1])}:"
        f" {accepted} tokens are accepted.",
        f"With {_quoted(texts[accepted])} it is {number(ratios[accepted])}, and no later token"
        " helps: the rest is rejected.",
        f"The target adds {_quoted(bonus)} from the same pass, so this pass gave"
        f" {len(decision.emitted)} tokens.",
    ]
    if bonus == texts[accepted]:
        sentences[-1] += (
            " That it draws the very word that was rejected is no contradiction: the draft was"
            " much surer of it than the target, but the target finds it possible."
        )
    return {
        "context": ("…" if len(before) > _CONTEXT_CHARACTERS else "")
        + before[-_CONTEXT_CHARACTERS:],
        "rows": rows,
        "bonus": bonus,
        "accepted": accepted,
        "limit": limit,
        "limit_text": f"log τ = {number(limit)} (τ = {trace.config.accept_threshold:g})",
        "columns": ["draft token", "log p joint", "log q joint", "log p/q", "> log τ"],
        "sentences": sentences,
        "source": f"Pass {step.index + 1} of a recorded run: {trace.target.name} on"
        f" {trace.versions.get('hardware', trace.device)}, γ {trace.config.num_draft_tokens},"
        f" W {trace.config.beam_width}, temperature {trace.config.temperature:g}. Nothing in it is"
        " invented.",
    }


def _quoted(text: str) -> str:
    return f"“{text.strip()}”"
