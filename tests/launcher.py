"""A program that runs in a process which is forked from one with all imports; see ``forked_programs.py``.

That one has the arguments, environment, folder, stdin, stdout and stderr of this one. It gets this one's signals, and
ends with it; this one ends as it did.
"""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode() + b"\n")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: connection.send(bytes([received])))
    code = int(connection.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
