"""A whole service of separate processes: PostgreSQL, etcd, an object store, frontends and workers."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.etcd import EtcdServer
from tests.faults.clients import Body, Clients
from tests.faults.ledger import Ledger, has_begun
from tests.faults.processes import Process, until
from tests.postgres import PostgresServer

_STANDIN = Path(__file__).parent / "standin"
# Videos that a worker takes at the same time, by default.
_ROOM = 2


class Deployment:
    """Started by ``make_whole``, which also replaces whatever has died since; ``stop`` ends all of it.

    Frontends reach the database at ``database_url``, or at one of their own, by their names.
    """

    def __init__(
        self,
        folder: Path,
        *,
        etcd: EtcdServer,
        postgres: PostgresServer,
        database_url: str,
        engine: str,
        num_workers: int,
        num_frontends: int = 2,
        settings: Mapping[str, str] | None = None,
        own_database_urls: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.etcd = etcd
        self.postgres = postgres
        self.database_url = database_url
        self.ledger = Ledger(database_url)
        self.clients = Clients([])
        self.frontends: dict[str, Process] = {f"frontend-{number}": None for number in range(num_frontends)}  # type: ignore[misc]
        self.workers: dict[str, Process] = {f"worker-{number}": None for number in range(num_workers)}  # type: ignore[misc]
        # What each request gives when nothing disturbs it, by the request as a client sends it.
        self.undisturbed: dict[str, bytes] = {}
        self._engine = engine
        self._settings = dict(settings or {})
        self._own_database_urls = dict(own_database_urls or {})
        self._started: list[Process] = []
        self._ports: list[int] = []
        (folder / "objects" / "bucket").mkdir(parents=True)

    @property
    def objects(self) -> Path:
        """What is stored: the object store's own folder."""
        return self.folder / "objects"

    def make_whole(self) -> None:
        """Start what is not there, and return when all of it says that it works."""
        for name, process in self.frontends.items():
            if process is None or not process.is_alive:
                self.start_frontend(name)
        for name, process in self.workers.items():
            if process is None or not process.is_alive:
                self.start_worker(name)
            else:
                process.send(signal.SIGCONT)  # a test that failed may have left it frozen
        for process in self.frontends.values():
            process.wait_until_said("listening")
        self.clients.urls = [process.wait_until_said("listening")["url"] for process in self.frontends.values()]
        self._ports += [int(url.rpartition(":")[2]) for url in self.clients.urls]
        for process in self.workers.values():
            process.wait_until_said("serving")

    def start_frontend(self, name: str) -> Process:
        """Without waiting until it answers."""
        self.frontends[name] = self._start(name, "frontend", "--port", "0")
        return self.frontends[name]

    def start_worker(self, name: str) -> Process:
        """Without waiting until it serves."""
        self.workers[name] = self._start(name, "worker", "--engine", self._engine, "--device", "cpu")
        return self.workers[name]

    def worker(self, worker_id: str) -> Process:
        """The process of the worker that calls itself so."""
        return next(one for one in self.workers.values() if worker_id_of(one) == worker_id)

    def make_undisturbed(self, bodies: list[Body]) -> None:
        """Learn what these requests give."""
        ids = {self.clients.create(body): body for body in bodies}
        self.clients.wait(list(ids))
        self.undisturbed |= {key_of(body): self.clients.content(video_id) for video_id, body in ids.items()}

    def worker_ids(self) -> list[str]:
        """What the workers call themselves; all serve."""
        return [str(worker_id_of(process)) for process in self.workers.values()]

    def wait_until_worker_works(self, worker_id: str, body: Body) -> str:
        """Send as many of these as the others have no room for, until that worker has begun one: its id."""

        def look() -> str | None:
            sent = [self.clients.create(body) for _ in range(_ROOM * len(self.workers))]
            self.clients.wait(sent)
            return next((one for one in sent if has_begun(self.ledger.history(one), worker_id)), None)

        return until(look, f"{worker_id} takes a video")

    @contextmanager
    def holding_uploads(self, ending: str) -> Iterator[Path]:
        """Uploads of such names wait until the end of this; the path says which one does, once one has come."""
        hold, held = self.objects.with_suffix(".hold"), self.objects.with_suffix(".held")
        hold.write_text(ending, encoding="utf-8")
        try:
            yield held
        finally:
            hold.unlink(missing_ok=True)
            held.unlink(missing_ok=True)

    def tails(self) -> str:
        """The ends of all logs, for the report of a failure."""
        alive = [*self.frontends.values(), *self.workers.values()]
        return "\n".join(f"--- {one.name}\n{one.tail()}" for one in alive if one is not None)

    def stop(self) -> dict[str, int]:
        """End everything as an operator would, the workers first; exit codes by name. No process stays, in any case."""
        try:
            return self._end_all(self.workers) | self._end_all(self.frontends)
        finally:
            for process in self._started:
                process.end()
            self.clients.close()

    def _end_all(self, processes: Mapping[str, Process]) -> dict[str, int]:
        alive = {name: process for name, process in processes.items() if process is not None and process.is_alive}
        for process in alive.values():
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
        # One that was still starting has no way to end but that of any program.
        return {name: process.wait() for name, process in alive.items() if process.is_up}

    def listening_ports(self) -> list[int]:
        """Those of this deployment's frontends that something still listens on."""
        return [port for port in self._ports if _is_listening(port)]

    def _start(self, name: str, *arguments: str) -> Process:
        environment = {
            "KINEMA_LOG_FORMAT": "json",
            "KINEMA_DATA_DIR": str(self.folder / "data"),
            "KINEMA_STORAGE_URL": "s3://bucket",
            "KINEMA_JOBS_DATABASE_URL": self._own_database_urls.get(name, self.database_url),
            "KINEMA_CLUSTER_ETCD_ENDPOINTS": self.etcd.url,
            "KINEMA_CLUSTER_HOST": "127.0.0.1",
            "PGAPPNAME": name,
            "STANDIN_FOLDER": str(self.objects),
            "PYTHONPATH": f"{_STANDIN}:{os.environ.get('PYTHONPATH', '')}",
            **self._settings,
        }
        if arguments[0] == "worker":
            # A worker has nothing to do with the database; that it runs without is part of what is tested.
            del environment["KINEMA_JOBS_DATABASE_URL"]
        # One frontend and one worker are programs, as an operator starts them. The others, and what replaces them, are
        # forked: to start from nothing takes two to five seconds of a core, most of it for imports.
        is_forked = any(one.name.partition("-")[0] == arguments[0] for one in self._started)
        process = Process(self.folder, name, arguments, environment, is_forked=is_forked)
        self._started.append(process)
        return process


def worker_id_of(process: Process) -> str | None:
    """What the worker calls itself; None before it serves."""
    said = process.said("serving")
    return None if said is None else said["worker_id"]


def key_of(body: Body) -> str:
    return repr(sorted(body.items()))


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
