"""Wan models: diffusers components and checkpoints, our own denoising loop."""
