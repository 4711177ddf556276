"""The Wan transformer as this engine runs it: diffusers' weights and roundings, fewer passes over memory.

Read ``forward.py`` first. ``model.py`` is what the denoising loop holds. Operations exist twice: in torch
(``block_operations.py``, ``fp8_operations.py``) and for CUDA (``block_kernels.py``, ``fp8_kernels.py``). A network gets
those of its device when it is built, and holds them.
"""
