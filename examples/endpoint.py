"""A running page as a service: an answer that arrives in parts, and two methods side by side.

python examples/endpoint.py http://127.0.0.1:7860
"""

from __future__ import annotations

import sys

from gradio_client import Client

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
client = Client(address, verbose=False)

lossless = [one["id"] for one in client.predict(api_name="/methods") if one["lossless"]]
print("lossless:", ", ".join(lossless))

answer = {}
shown = 0
for answer in client.submit("Why is the sky blue?", max_new_tokens=48, api_name="/generate"):
    print(answer["text"][shown:], end="", flush=True)
    shown = len(answer["text"])
print(f"\n{answer['tokens_per_second']:.0f} tokens/s, {answer['tokens_per_pass']:.1f} a pass")

found = client.predict(
    "Name three rivers.", ["speculative", "mtad"], max_new_tokens=48, api_name="/compare"
)
for trace in found["traces"]:
    summary = trace["summary"]
    print(f"{trace['method']}: {summary['tokens']} tokens, {summary['target_passes']} passes")
