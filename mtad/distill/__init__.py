"""Makes a draft for a target: the target writes, a small model learns, overlap is measured.

`recipe` is the configuration, `writing` and `corpus` are the first phase, `unroll`, `losses`,
`checkpoint` and `training` the second; `run.distill` does everything, as `python -m mtad
distill` does. Importing this package, or `recipe`, loads no torch.
"""
