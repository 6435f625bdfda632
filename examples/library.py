"""One prompt, two decoders: what each pass of the target was worth.

PYTHONPATH=. python examples/library.py "Why is the sky blue?"
"""

from __future__ import annotations

import sys

import mtad

pair = mtad.load_pair("smollm2")
config = mtad.DecodeConfig(max_new_tokens=32, num_draft_tokens="auto")
prompt = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"

for method in ("speculative", "mtad"):
    print(f"\n{method}")
    # `mtad.stream` gives a Step for each pass of the target while it runs, then the Trace.
    for event in mtad.stream(method, pair, prompt=prompt, config=config):
        if isinstance(event, mtad.Trace):
            summary = event.summary
            print(
                f"  {summary.tokens} tokens in {summary.target_passes} passes,"
                f" {summary.tokens_per_second:.0f} tokens/s, perplexity {summary.perplexity:.2f}"
            )
        else:
            decision = event.decision
            offered, accepted = decision.tree.depth, len(decision.path)
            print(f"  {accepted} of {offered} accepted  {event.text!r}")
