"""Builds the page and launches it. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where.

MTAD_HOSTED=1 is for a page that strangers share: small limits, one pair.
"""

from __future__ import annotations

from mtad.ui.hosting import (
    keep_memory_together,
    on_shared_gpu,
    page_source,
    port_and_limits,
    shared_gpu_stream,
)

if __name__ == "__main__":
    keep_memory_together()
    port, limits = port_and_limits()
    # gradio reads the same variables when it is imported.
    from mtad.ui.page import build, launch_options
    from mtad.ui.site import library_stream

    source = page_source(limits)
    stream = library_stream
    if on_shared_gpu():
        stream = shared_gpu_stream(stream, source, limits)
    source.start()
    build(source, stream, limits).launch(server_port=port, **launch_options())
