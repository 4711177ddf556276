"""From one noise level to the next: the solvers, each in a file of its own. ``choice.py`` makes that of a request."""
