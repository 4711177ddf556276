"""Several devices as one: two real processes exchange what training exchanges."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from multiprocessing.connection import Connection

from tests.forked import ForkedProcess


def exchange(environment: Mapping[str, str], said: Connection) -> None:
    """In a process of its own: be one of the ranks."""
    import torch

    from training.tiny.ranks import Ranks

    os.environ.update(environment)
    ranks = Ranks()
    weights = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,), (1,))]
    weights[0].grad = torch.full((2, 3), float(ranks.rank))
    weights[1].grad = torch.arange(4.0) * (1 + ranks.rank)
    ranks.average_gradients(weights)
    said.send([weights[0].grad.tolist(), weights[1].grad.tolist(), weights[2].grad, ranks.agree(7.5 + ranks.rank)])
    ranks.close()


def test_two_ranks_average_their_gradients_and_agree_on_the_time() -> None:
    """Both end with the mean of both, parameters without a gradient are left out, and rank 0 has the clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in ("0", "1"):
        reading, writing = multiprocessing.Pipe(duplex=False)
        process = ForkedProcess(exchange, shared | {"RANK": rank, "LOCAL_RANK": rank}, writing)
        writing.close()
        ranks.append((process, reading))
    said = []
    for process, reading in ranks:
        with reading:
            said.append(reading.recv())
        assert process.wait(120) == 0
    assert said[0] == said[1] == [[[0.5] * 3] * 2, [0.0, 1.5, 3.0, 4.5], None, 7.5]
