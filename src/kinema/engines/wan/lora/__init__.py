"""LoRA files: which ones a folder has, whether one fits a model, and what it changes in each module.

``folder.py`` lists files, ``keys.py`` knows the names that trainers give to tensors, ``header.py`` what a file says of
itself, ``fit.py`` compares it with a model by its header alone, and ``digests.py`` says which file it is. In
``library.py`` are those that a request may name, and ``reading.py`` reads the tensors. Only ``reading.py`` and
``delta.py`` import torch. Nothing here is ever unpickled, and nothing here knows how a change is applied.
"""
