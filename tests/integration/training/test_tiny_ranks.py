"""Several devices as one: two real processes exchange what training exchanges."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

RANK = """
import json, torch
from training.tiny.ranks import Ranks

ranks = Ranks()
weights = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,), (1,))]
weights[0].grad = torch.full((2, 3), float(ranks.rank))
weights[1].grad = torch.arange(4.0) * (1 + ranks.rank)
ranks.average_gradients(weights)
print(json.dumps([weights[0].grad.tolist(), weights[1].grad.tolist(), weights[2].grad, ranks.agree(7.5 + ranks.rank)]))
ranks.close()
"""


def test_two_ranks_average_their_gradients_and_agree_on_the_time() -> None:
    """Both end with the mean of both, parameters without a gradient are left out, and rank 0 has the clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    said = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert said[0] == said[1] == [[[0.5] * 3] * 2, [0.0, 1.5, 3.0, 4.5], None, 7.5]
