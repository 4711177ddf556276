"""The Wan transformer as this engine runs it: diffusers' weights and roundings, fewer passes over memory.

Read ``forward.py`` first. ``model.py`` is what the denoising loop holds.
"""
