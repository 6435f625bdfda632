"""Measures a pair on prompts that it was not trained on: a grid of settings, pooled figures."""
