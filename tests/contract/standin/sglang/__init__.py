"""A stand-in for SGLang, with the manners of the real one that the adapter has to do with; see ``entrypoints``."""
