"""Wan models: diffusers components and checkpoints, our own denoising loop."""

from __future__ import annotations

import os

# Read by the OpenMP of torch's CPU build when it loads, so before any file here imports torch. Threads that share a
# product wait for one another in a loop, of 300,000 turns by default, some 10 ms, in which they keep the core from the
# very thread that they wait for. On two cores of which another program has one, a step of the bundled model took 5 to
# 20 times as long as alone (620 for 117 ms); with so few turns 2.6 to 3.5 times, and alone it takes as long as before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
