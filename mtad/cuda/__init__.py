"""An engine for GPUs: lean passes over preallocated caches, recorded once and replayed.

A pass through transformers launches some thousand kernels from Python, which takes longer than
the GPU needs for them. Here a pass is a CUDA graph: its shapes are few, since rows are padded and
caches end at powers of two, and all that changes between two passes lies in buffers that stay
where they are.

On a CPU the same code runs without graphs; that is how it is tested where there is no GPU.
"""
