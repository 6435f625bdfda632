"""The look of the page: system fonts only, so that no other host is asked for anything."""

from __future__ import annotations

import gradio as gr

ACCENT = "#0072b2"
ACCENT_DARKER = "#005a8d"
# A scale around the blue that means "accepted", so that the page has one blue and not two.
_BLUES = gr.themes.Color(
    name="mtad",
    c50="#eef7fc",
    c100="#d6ebf7",
    c200="#abd6ee",
    c300="#79bce2",
    c400="#4aa3d5",
    c500=ACCENT,
    c600="#0067a1",
    c700=ACCENT_DARKER,
    c800="#04466c",
    c900="#06324c",
    c950="#041f30",
)


def theme() -> gr.themes.Base:
    """Gradio's default theme with our accent and with greys that reach 4.5:1 on both grounds."""
    return gr.themes.Default(
        primary_hue=_BLUES,
        secondary_hue=_BLUES,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill=ACCENT,
        button_primary_background_fill_hover=ACCENT_DARKER,
        button_primary_background_fill_dark=ACCENT,
        button_primary_background_fill_hover_dark=ACCENT_DARKER,
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        checkbox_label_background_fill_selected="*background_fill_primary",
        checkbox_background_color_selected=ACCENT,
        checkbox_background_color_selected_dark=ACCENT,
        checkbox_border_color_selected=ACCENT,
        checkbox_border_color_selected_dark=ACCENT,
        # Selected tabs and links: the light end of the scale on dark ground.
        link_text_color=ACCENT,
        link_text_color_dark="*primary_300",
        slider_color=ACCENT,
        slider_color_dark=ACCENT,
    )
