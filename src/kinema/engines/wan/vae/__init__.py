"""The decoder of Wan's VAE as a stream: read ``stream.py`` first, then ``decoder_operations.py``."""
