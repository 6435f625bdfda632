"""The web page. Nothing else in mtad imports gradio."""
