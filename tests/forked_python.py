"""Runs as ``python``, but in a process that is forked from one with all imports; see ``forked_pytest.py``.

That process gets the stdin, stdout and stderr of this one, which ends with it.
"""

import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    socket.send_fds(connection, [sys.argv[-1].encode()], [0, 1, 2])
    connection.recv(1)  # the end
