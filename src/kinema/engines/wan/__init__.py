"""Wan models: diffusers components and checkpoints, our own denoising loop."""

from __future__ import annotations

import os

# Read by the OpenMP of torch's CPU build when it loads, so before any file here imports torch. Threads that share a
# product wait for one another in a loop, of 300,000 turns by default, some 10 ms, in which they keep the core from the
# very thread that they wait for. On two cores of which another program has one, a step of the bundled model took 4 to 9
# times as long as alone (128x128) or 10 to 36 times (64x64); with so few turns 2.6 and 3.8 times. It costs 4 and 11 %
# when nothing else runs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
