"""The CPU engine: Llama-shaped models on kernels that are compiled for the machine at hand.

`library` compiles and loads the kernels, `packing` brings weights into their layout, `model`
runs a Hugging Face Llama on them. Needs a C compiler once; what it made is kept.
"""
