"""What measures the wan engine, and nothing that computes a video: ``kinema bench engine``.

These files may import torch; the commands import them when they run.
"""
