"""What is written beside a finished draft: report.json, and a model card made of it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers

from mtad.distill.checkpoint import Progress
from mtad.distill.corpus import Corpus
from mtad.distill.files import write_text
from mtad.distill.recipe import Recipe
from mtad.distill.targets import Target, hardware
from mtad.draft_files import FILE_NAME
from mtad.hidden_draft import HiddenDraft
from mtad.presets import presets
from mtad.version import __version__

REPORT = "report.json"
CARD = "README.md"
RECIPE = "recipe.json"


def make_report(
    target: Target,
    corpus: Corpus,
    recipe: Recipe,
    draft: HiddenDraft,
    progress: Progress,
    saved: dict[str, list[float]],
    start: Path | None = None,
) -> dict[str, Any]:
    """Everything that the card says, as JSON.

    Args:
        target: of the draft.
        corpus: that it learnt from.
        recipe: by which.
        draft: the finished one.
        progress: the learning curve and the time.
        saved: overlaps of the draft as it was saved, in 8 or 4 bits.
        start: folder of the draft that it began with.
    """
    return {
        "target": target.name,
        "target_digest": target.digest,
        "license": target.license,
        "recipe": dataclasses.asdict(recipe),
        "start": "" if start is None else start.resolve().name,
        "start_tokens": 0 if start is None else _tokens_seen(start),
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "corpus": {
            "rows": corpus.num_rows,
            "tokens": corpus.num_rows * corpus.row_tokens,
            "shares": corpus.shares(),
            "digest": corpus.digest,
        },
        "saved": saved,
        "curve": progress.curve,
        "training_seconds": progress.seconds,
        "hardware": hardware(target.device),
        "versions": {
            "mtad": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json, recipe.json and README.md."""
    for name, content in ((REPORT, report), (RECIPE, report["recipe"])):
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / name, text + "\n")
    write_text(folder / CARD, card(report))


def _tokens_seen(folder: Path) -> int | None:
    """Tokens that a draft and what it began with were trained on; None if nothing tells."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        before = report["start_tokens"] if report["start"] else 0
        return int(report["curve"][-1]["tokens"]) + int(before)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return None


def card(report: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    recipe, corpus, last = report["recipe"], report["corpus"], report["curve"][-1]
    draft, training, shares = recipe["draft"], recipe["training"], corpus["shares"]
    target, versions = report["target"] or "this target", report["versions"]
    license_name = report["license"]
    layers = ", ".join(str(layer) for layer in draft["target_layers"])
    terms = " + ".join(f"{value:g} × {name}" for name, value in training["losses"].items() if value)
    seen = report["start_tokens"]
    seen = f", which had seen {seen / 1e6:.2f} million tokens" if seen is not None else ""
    begun = report["start"]
    start = f" It began with the weights of {begun}{seen}." if begun else ""
    preset = any(recipe["target"] == known.id for known in presets())
    options = "" if preset else f" --target PATH/TO/{target}"
    options += f" --start {begun}" if begun else ""
    anew = f" Without {begun}, leave --start out: training then begins anew." if begun else ""
    copying = (
        " In use, what followed the last words where they stood before gets a share of q: copying"
        " is no part of the figures below."
        if draft["copy_weights"]
        else ""
    )
    bits = _bits(report)
    sections = {
        f"# A draft for {target}": (
            f"It proposes tokens that {target} verifies, in speculative and in multi-token assisted"
            f" decoding, and is of no use alone: {draft['num_layers']} layers of its own"
            f" ({report['parameters'] / 1e6:.1f} M parameters, in {bits} bits:"
            f" {FILE_NAME}) read the target's hidden states {layers} and write into the target's"
            f" own head, cut to the {draft['head_tokens']:,} tokens that are most frequent in"
            " answers and to those of the text so far; all others have q = 0. Neither embedding nor"
            f" head is stored.{copying}"
        ),
        "## Data": (
            f"Written by the target itself: {corpus['tokens'] / 1e6:.2f} million tokens in"
            f" {corpus['rows']:,} rows ({shares['question']:.0%} questions, {shares['answer']:.0%}"
            f" answers, {shares['forced']:.0%} pieces of the chat template). How they were sampled"
            f" stands in the recipe. {training['held_out_rows']} rows were never trained on."
        ),
        "## Training": (
            f"{last['tokens'] / 1e6:.2f} million tokens seen in {last['step']:,} steps of AdamW,"
            f" {report['training_seconds'] / 3600:.2f} hours on {report['hardware']}. Loss:"
            f" {terms} + {training['feature_weight']:g} × the distance to the target's next state,"
            f" which falls to 0; {training['depths']} unrolled depths, each weighing"
            f" {training['depth_decay']:g} of the one before.{start}"
        ),
        "## Overlap with the target": (
            "Mean of Σ min(p, q) over the answers in the held-out rows, by depth of the draft:"
            f" unwarped, and with top-k {training['warp_top_k']} and top-p"
            f" {training['warp_top_p']:g} on both sides. {REPORT} holds the learning curve."
        ),
        _table(report): "",
        "## How to use it": (
            "python -m mtad generate, compare and acceptance take it with --draft FOLDER; Python"
            " code makes mtad.ModelPair(target, mtad.load_draft(FOLDER, target), tokenizer)."
        ),
        "## How to remake it": (
            f"Run python -m mtad distill {RECIPE} --work WORK --out OUT{options}. The same hardware"
            f" and versions give the same draft, others one very like it.{anew} It was made on"
            f" {report['date']} with mtad {versions['mtad']}, torch {versions['torch']} and"
            f" transformers {versions['transformers']}."
        ),
        "## Licence": (
            f"{license_name}, as the target, which wrote the data."
            if license_name
            else "That of the target, which wrote the data."
        ),
    }
    front = (
        f"---\nlicense: {(license_name or 'other').lower()}\nbase_model: {target}\n"
        "tags: [speculative-decoding, multi-token-assisted-decoding]\n---"
    )
    body = [f"{head}\n\n{_paragraph(text)}".rstrip() for head, text in sections.items()]
    return "\n\n".join([front, *body]) + "\n"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _bits(report: dict[str, Any]) -> int:
    """Of a stored weight; a report from before there was a choice says nothing."""
    return int(report["recipe"]["draft"].get("weight_bits", 8))


def _table(report: dict[str, Any]) -> str:
    """Overlaps by depth: before and after training, and as saved."""
    saved = report["saved"]
    bits = _bits(report)
    depths = range(1, len(saved["alpha"]) + 1)
    lines = [["", *(f"depth {depth}" for depth in depths)], ["---"] * (len(depths) + 1)]
    for name, values in (
        ("at the start" if report["start"] else "untrained", report["curve"][0]),
        ("trained", report["curve"][-1]),
        (f"as saved, in {bits} bits", saved),
    ):
        pairs = zip(values["alpha"], values["alpha_warped"], strict=True)
        lines.append([name, *(f"{plain:.3f}, {warped:.3f}" for plain, warped in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
