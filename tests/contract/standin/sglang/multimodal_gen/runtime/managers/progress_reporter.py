"""The progress bar of the native pipeline, which tells a socket where it is, once for each percent."""

from __future__ import annotations

import zmq


class ReportingTqdm:
    def __init__(self, total, request_ids, endpoint):
        self.total, self._request_ids, self._completed = total, request_ids, 0.0
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(endpoint)

    def _advance(self, n):
        percent = int(self._completed * 100 // self.total)
        self._completed += n
        if int(self._completed * 100 // self.total) == percent:
            return
        for request_id in self._request_ids:
            self._socket.send_json([request_id, self._completed, self.total])
