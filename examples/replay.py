"""Reads a recorded run and shows what became of every draft. Needs neither torch nor a model.

python -m mtad generate "Why is the sky blue?" --json trace.json
PYTHONPATH=. python examples/replay.py trace.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import mtad
from mtad.terminal import clean

trace = mtad.Trace.from_json(Path(sys.argv[1]).read_bytes())
print(f"{trace.method}, {trace.target.name}, {trace.device}, {trace.dtype}")

for step in trace.steps:
    decision = step.decision
    kept = set(decision.path)
    accepted = "".join(step.node_texts[node] for node in decision.path)
    rejected = "".join(text for node, text in enumerate(step.node_texts) if node not in kept)
    own = step.emitted_texts[len(decision.path) :]
    parts = [f"{step.seconds:6.2f} s", f"+{accepted!r}"]
    if rejected:
        parts.append(f"-{rejected!r}")
    if own:
        parts.append(f"{decision.final_kind} {own[0]!r}")
    print(clean("  ".join(parts)))
