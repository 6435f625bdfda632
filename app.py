"""Builds the page and launches it. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where.

MTAD_HOSTED=1 is for a page that strangers share: small limits, one pair.
"""

from __future__ import annotations

from mtad.ui.hosting import (
    keep_memory_together,
    on_shared_gpu,
    page_source,
    shared_gpu_stream,
)
from mtad.ui.limits import limits_from_environment
from mtad.ui.page import build, launch_options
from mtad.ui.site import library_stream

if __name__ == "__main__":
    keep_memory_together()
    limits = limits_from_environment()
    source = page_source(limits)
    stream = library_stream
    if on_shared_gpu():
        stream = shared_gpu_stream(stream, source, limits)
    source.start()
    build(source, stream, limits).launch(**launch_options())
