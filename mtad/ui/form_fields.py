"""A field of `mtad.ui.form` as a component of gradio."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mtad.ui.form import Field


def field_component(field: Field, visible: bool = True) -> Any:
    """What a visitor fills in; hidden where no chosen method reads it."""
    common: dict[str, Any] = {
        "value": field.default,
        "label": field.label,
        "info": field.meaning,
        "visible": visible,
        "min_width": 230,
    }
    if field.kind == "slider":
        return gr.Slider(field.low, field.high, step=field.step, **common)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), filterable=False, **common)
    if field.kind == "tick":
        return gr.Checkbox(**common)
    if field.kind == "text":
        return gr.Textbox(lines=1, max_lines=4, **common)
    return gr.Number(**common)
