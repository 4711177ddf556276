"""Measurements as commands, ``kinema bench``: the service, the scheduler and, in ``bench/wan/``, the engine."""
