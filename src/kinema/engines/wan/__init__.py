"""Wan models: checkpoints in diffusers' layout, and networks and a denoising loop of our own."""

from __future__ import annotations

import os

# The OpenMP of torch's CPU build reads this when it loads, so it is set before any file here imports torch. Threads
# that share a product wait for one another in a loop, by default of 300,000 turns or some 10 ms, and keep the core from
# the very thread for which they wait. On two cores, one of which another program used, a step of the bundled model took
# 4 to 9 times as long as alone (128x128) or 10 to 36 times (64x64); with so few turns, 2.6 and 3.8 times. That costs 4
# and 11 % when nothing else runs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
