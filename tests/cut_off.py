"""Starts the page as its container does, in a network namespace that has nothing but itself.

`unshare --net python -m tests.cut_off TREE` with the container's environment. The server runs as
user 1000, with one capability: to read what it may not, since an environment of packages can lie
in somebody's home. It may write under $TMPDIR only. Asks the page for an answer and prints, as one
line of JSON, the trace, what writing was refused, and what the network said.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

from tests.test_hosting import USER_ID, instructions

_AS_USER = [
    "setpriv",
    f"--reuid={USER_ID}",
    f"--regid={USER_ID}",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
]
_PROBE = """
import json, os, socket, sys
refused = []
for folder in sys.argv[1:]:
    try:
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        refused.append(folder)
try:
    socket.create_connection(("192.0.2.1", 443), timeout=3)
    network = "connected"
except OSError as error:
    network = str(error)
print(json.dumps({"user": os.getuid(), "refused": sorted(refused), "network": network}))
"""


def main(tree: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    folders = [tree, os.environ["MTAD_HOME"]]
    probe = [*_AS_USER, sys.executable, "-c", _PROBE, *folders]
    told = json.loads(subprocess.run(probe, check=True, capture_output=True, text=True).stdout)
    told["started"] = time.time()
    program, *rest = json.loads(dict(instructions())["CMD"])
    assert program == "python"
    server = subprocess.Popen(
        [*_AS_USER, sys.executable, *rest],
        cwd=tree,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=sys.stderr,
    )
    try:
        address = f"http://127.0.0.1:{os.environ['GRADIO_SERVER_PORT']}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not come up")
            time.sleep(0.3)
        from gradio_client import Client

        client = Client(address, verbose=False)
        answer = client.predict(
            "Why is the sky blue?", ["autoregressive", "mtad"], 8, 2, api_name="/compare"
        )
        told["trace"] = answer["traces"][1]
    finally:
        server.terminate()
        server.wait(30)
    print(json.dumps(told))


if __name__ == "__main__":
    socket.setdefaulttimeout(300)
    main(sys.argv[1])
