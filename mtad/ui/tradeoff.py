"""A sweep as the page shows and exports it: points, Pareto fronts, table, CSV and JSON.

Pure: knows no model, no browser and no gradio. All figures are formatted and every decision is
made here; the browser only places the marks.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from mtad.acceptance.measures import Estimate
from mtad.acceptance.records import Setting
from mtad.bench.measures import MIN_PROMPTS, Row
from mtad.bench.records import plain
from mtad.catalogue import method_info
from mtad.ui.steps import DASH, number
from mtad.ui.sweeping import Snapshot, Sweep

COLUMNS = (
    "setting",
    "tokens/s",
    "perplexity",
    "tokens per pass",
    "repeated 4-grams",
    "J per token",
    "runs",
)
RUN_COLUMNS = ("prompt", "tokens", "tokens/s", "tokens per pass", "perplexity", "J per token")
EXPORT_FORMAT = 1
_ACTIVE = ("waiting", "running")


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Of (more is better, less is better): whether no other point is as good in both.

    A point that equals another on both axes does not beat it. None is never on the front.
    """

    def beaten(own: tuple[float, float]) -> bool:
        return any(
            other is not None and other != own and other[0] >= own[0] and other[1] <= own[1]
            for other in points
        )

    return [point is not None and not beaten(point) for point in points]


def parameters(setting: Setting, others: Sequence[Setting] = ()) -> str:
    """γ, τ and W of a setting; with `others`, only those that differ within its method."""
    family = [one for one in others if one.method == setting.method]
    parts = []
    for symbol, name in (
        ("γ", "num_draft_tokens"),
        ("τ", "accept_threshold"),
        ("W", "beam_width"),
    ):
        value = getattr(setting, name)
        if value is None:
            continue
        if family and all(getattr(one, name) == value for one in family):
            continue
        parts.append(f"{symbol} {value:g}" if not isinstance(value, str) else f"{symbol} {value}")
    return ", ".join(parts)


def label(setting: Setting) -> str:
    """A setting in words: what the shelf and the lists show."""
    own = parameters(setting)
    title = method_info(setting.method).title
    return f"{title}, {own}" if own else title


def view(sweep: Sweep) -> dict[str, Any]:
    """All that the page shows of a sweep, ready for JSON."""
    now = sweep.snapshot()
    settings = sweep.request.settings
    speed_front, energy_front = fronts(now, settings)
    rows = []
    for index, setting in enumerate(settings):
        info = method_info(setting.method)
        row = now.rows.get(setting)
        rows.append(
            {
                "n": index + 1,
                "method": setting.method,
                "title": info.title,
                "parameters": parameters(setting),
                "label": " ".join(
                    part for part in (setting.method, parameters(setting, settings)) if part
                ),
                "cells": _cells(row, len(sweep.request.tasks)),
                "failure": now.failures.get(setting, ""),
                "speed": _axis(row.tokens_per_second) if row else None,
                "perplexity": _axis(row.perplexity) if row else None,
                "joules": _axis(_joules(row)) if row else None,
                "front": {"perplexity": speed_front[index], "joules": energy_front[index]},
            }
        )
    return {
        "sweep": sweep.id,
        "state": now.state,
        "active": now.state in _ACTIVE,
        "done": now.done,
        "total": sweep.request.size,
        "status": status(now, sweep),
        "remaining": remaining(now),
        "error": now.error,
        "say": "" if now.state in _ACTIVE else status(now, sweep),
        "notes": notes(now, sweep),
        "columns": list(COLUMNS),
        "run_columns": list(RUN_COLUMNS),
        "rows": rows,
        "energy": energy_note(now),
        "estimated": any(row.energy is not None and row.energy.estimated for row in rows_of(now)),
    }


def rows_of(now: Snapshot) -> list[Row]:
    """The rows that there are."""
    return list(now.rows.values())


def fronts(now: Snapshot, settings: Sequence[Setting]) -> tuple[list[bool], list[bool]]:
    """By setting: on the front of tokens/s and perplexity, and of tokens/s and J per token."""

    def points(figure: Any) -> list[tuple[float, float] | None]:
        found: list[tuple[float, float] | None] = []
        for setting in settings:
            row = now.rows.get(setting)
            speed = row.tokens_per_second if row else None
            other = figure(row) if row else None
            found.append(None if speed is None or other is None else (speed.value, other.value))
        return found

    return pareto(points(lambda row: row.perplexity)), pareto(points(_joules))


def status(now: Snapshot, sweep: Sweep) -> str:
    """One line that says what goes on."""
    total = sweep.request.size
    if now.state in _ACTIVE:
        if now.job is None:
            return "The last run is being counted."
        task, setting = now.job
        return (
            f"Run {now.done + 1} of {total}: {label(setting)}, prompt {task.id},"
            f" {now.doing or 'in line for the device'}"
        )
    kept = f"{now.done} of {total} runs are kept"
    if now.state == "stopped":
        return f"Stopped: {kept}. Run makes the missing ones; the same settings go on."
    if now.state == "failed":
        return f"Ended early: {kept}."
    if now.done < total:
        return f"Finished, but some settings failed: {kept}."
    settings, tasks = len(sweep.request.settings), len(sweep.request.tasks)
    return f"Finished: {total} runs, {_many(settings, 'setting')} on {_many(tasks, 'prompt')}."


def remaining(now: Snapshot) -> str:
    """The time that is left, in words; "" where nobody can tell."""
    seconds = now.remaining_seconds
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s left"
    return f"about {round(seconds / 60)} min left"


def notes(now: Snapshot, sweep: Sweep) -> list[str]:
    """What must be read beside the figures."""
    config = sweep.request.config
    found = [
        f"All runs: at most {config.max_new_tokens} tokens, temperature {config.temperature:g},"
        f" top-k {config.top_k}, top-p {config.top_p:g}, seed {config.seed}"
        + (f"; {now.models}." if now.models else "."),
        "tokens/s is the median over the prompts, everything else is pooled over all tokens."
        " Small figures are 95 % intervals over the prompts"
        + (
            "; as all settings have the same prompts, they differ more surely than these say."
            if len(sweep.request.tasks) >= MIN_PROMPTS
            else f"; there are none, as that takes at least {MIN_PROMPTS} prompts."
        ),
        "The front is drawn through the figures themselves; where intervals overlap, other prompts"
        " may draw another one.",
        "A low perplexity can also come from repetition: look at the repeated 4-grams.",
    ]
    counts = {now.rows[one].prompts if one in now.rows else 0 for one in sweep.request.settings}
    if now.state not in _ACTIVE and len(counts) > 1:
        found.append("Settings have answered different numbers of prompts: see the runs.")
    for one, failure in now.failures.items():
        found.append(f"{label(one)} was left out: {failure}")
    return found + list(now.notes)


def energy_note(now: Snapshot) -> str:
    """Why there is no energy to draw; "" if there is."""
    if not now.rows:
        return "known when the first run is finished"
    missing = [row for row in rows_of(now) if _joules(row) is None]
    if not missing:
        return ""
    if len(missing) < len(now.rows):
        return "not measured for some settings"
    energy = missing[0].energy
    return (energy.reason if energy else None) or "not measured"


def run_list(sweep: Sweep, setting: Setting, there: Any) -> list[dict[str, Any]]:
    """The runs of a setting: figures, and the keys of those traces for which `there` is true."""
    found = []
    for task, run, key in sweep.runs(setting):
        record = run.record
        perplexity = None if record.nll is None else _exp(record.nll / record.tokens)
        cells = [
            f"{record.tokens:,}",
            number(run.tokens_per_second, 1),
            number(record.tokens / record.target_passes),
            number(perplexity),
            _signed(run.energy.joules, run.timed_tokens, run.energy.estimated),
        ]
        found.append(
            {
                "prompt": task.id,
                "kind": task.kind,
                "text": str(task.request.get("prompt") or task.request["messages"][-1]["content"]),
                "cells": cells,
                "key": key if there(key) else "",
            }
        )
    return found


def to_csv(sweep: Sweep) -> str:
    """One line a setting, figures unrounded; an empty field is not measured or not defined."""
    out = io.StringIO()
    records = _exported(sweep)
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def to_json(sweep: Sweep) -> str:
    """Settings with their figures, the prompts, and every run in numbers."""
    now = sweep.snapshot()
    request = sweep.request
    whole = {
        "mtad_sweep": EXPORT_FORMAT,
        "models": now.models,
        "config": dataclasses.asdict(request.config),
        "prompts": [{"id": task.id, "kind": task.kind, **task.request} for task in request.tasks],
        "settings": _exported(sweep),
        "runs": plain([run for _, run, _ in sweep.runs()]),
        "notes": notes(now, sweep),
    }
    return json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False)


def _exported(sweep: Sweep) -> list[dict[str, Any]]:
    now = sweep.snapshot()
    settings = sweep.request.settings
    speed_front, energy_front = fronts(now, settings)
    found = []
    for setting, by_perplexity, by_joules in zip(settings, speed_front, energy_front, strict=True):
        row = now.rows.get(setting)
        energy = row.energy if row else None
        fields: dict[str, Any] = {
            **dataclasses.asdict(setting),
            "prompts": row.prompts if row else 0,
            "tokens": row.tokens if row else 0,
        }
        for name in ("tokens_per_second", "perplexity", "block_efficiency"):
            figure: Estimate | None = getattr(row, name) if row else None
            fields[name] = figure.value if figure else None
            fields[f"{name}_low"] = figure.low if figure else None
            fields[f"{name}_high"] = figure.high if figure else None
        fields |= {
            "distinct_4": row.distinct_4 if row else None,
            "repeated_4gram_share": row.repeated_4gram_share if row else None,
            "joules_per_token": row.joules_per_token if row else None,
            "energy_method": energy.method if energy else None,
            "energy_scope": energy.scope if energy else None,
            "energy_reason": energy.reason if energy else None,
            "front_perplexity": by_perplexity,
            "front_joules_per_token": by_joules,
            "failure": now.failures.get(setting),
        }
        found.append(fields)
    return found


def _cells(row: Row | None, planned: int) -> list[list[str]]:
    """By column after the first: a figure, and its interval or why there is none."""
    if row is None:
        return [[DASH, ""] for _ in COLUMNS[2:]] + [[f"0 of {planned}", ""]]
    share = row.repeated_4gram_share
    energy = row.energy
    joules = _signed(row.joules_per_token, 1, energy is not None and energy.estimated)
    return [
        _estimate(row.tokens_per_second, 1, "too short to measure"),
        _estimate(row.perplexity, 2, "a token had probability 0"),
        _estimate(row.block_efficiency, 2, "no target pass"),
        [DASH, "too short"] if share is None else [f"{100 * share:.0f} %", ""],
        [joules, ""],
        [f"{row.prompts} of {planned}", ""],
    ]


def _estimate(figure: Estimate | None, digits: int, why: str) -> list[str]:
    if figure is None:
        return [DASH, why]
    if figure.low is None or figure.high is None:
        return [number(figure.value, digits), ""]
    return [
        number(figure.value, digits),
        f"{number(figure.low, digits)}–{number(figure.high, digits)}",
    ]


def _signed(joules: float | None, tokens: int, estimated: bool) -> str:
    if joules is None or not tokens:
        return DASH
    return ("≈ " if estimated else "") + number(joules / tokens)


def _joules(row: Row) -> Estimate | None:
    return None if row.joules_per_token is None else Estimate(row.joules_per_token)


def _axis(figure: Estimate | None) -> list[float | None] | None:
    return None if figure is None else [figure.value, figure.low, figure.high]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _exp(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None
