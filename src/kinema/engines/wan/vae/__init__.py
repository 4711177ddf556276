"""The decoder of Wan's VAE as a stream: read ``stream.py`` first, then ``operations.py`` for what runs on a GPU."""
