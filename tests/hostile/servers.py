"""The servers that are attacked: programs of their own, as an operator starts them."""

from __future__ import annotations

from functools import partial

from tests import server_process
from tests.server_process import KINEMA

running_server = partial(server_process.running_server, program=KINEMA)
start_server = partial(server_process.start_server, program=KINEMA)
begin_server = partial(server_process.begin_server, program=KINEMA)
