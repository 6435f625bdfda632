"""Builds the page and launches it. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where."""

from __future__ import annotations

from mtad.ui.loading import PairLoader
from mtad.ui.page import build, launch_options

if __name__ == "__main__":
    loader = PairLoader()
    loader.start()
    build(loader).launch(**launch_options())
