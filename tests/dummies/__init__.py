"""Tiny random pipelines of diffusers' own classes, one for each kind of checkpoint. Nothing is downloaded for them."""
