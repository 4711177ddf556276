"""What all tests have in common."""

from __future__ import annotations

import gc
import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog
from hypothesis import settings

from tests.forked import become_kinema
from tests.forked_programs import ForkingPrograms
from tests.forked_pytest import forking_python
from tests.postgres import PostgresServer, running_postgres

# A run of the suite draws the same examples each time, so that it says the same of the same code; what a search with
# fresh draws finds (scripts/test-search) becomes an @example of its test. A deadline would be one of the machine.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("suite")

# Where this is set, each process of a server compiles all of Kinema anew, and each of pytest's all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Folders of which one process has all files: their models are made once, and their servers start once.
_BY_ONE_PROCESS = ("tests/contract/diffusers/", "tests/e2e/openai_sdk/")
# What takes longest comes first, so that nobody waits for it at the end.
_FIRST = (
    "tests/contract/diffusers/",
    "tests/integration/training/",
    "tests/e2e/",
    "tests/integration/wan/",
    "tests/integration/",
    "tests/contract/",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Without the garbage collector: all that a collection makes lives to the end of the run, so a walk over it frees
    nothing. It takes a third of the time of the imports, and a fraction of a second of each test that collects."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    # Seldomer than by default: what tests need to be freed they collect, and each visit costs a walk.
    gc.set_threshold(10_000)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those folders come first."""
    folders = [*_FIRST, ""]
    items.sort(key=lambda item: next(at for at, folder in enumerate(folders) if item.nodeid.startswith(folder)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """The processes of a run are forked."""
    # They, and the servers that they start, share the cores: threads of one would wait for the others. A test that
    # wants two has them sleep while they wait: in a loop they took three times as long, and others' cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    python = forking_python(config.args)
    config.add_cleanup(python.stop)
    for spec in specs:
        spec.python = shlex.join(python.command)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, but one process has all files of such a folder."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None

    class ByFileOrFolder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = next((folder for folder in _BY_ONE_PROCESS if nodeid.startswith(folder)), None)
            file: str = super()._split_scope(nodeid)
            return folder or file

    return ByFileOrFolder(config, log)


@pytest.fixture(autouse=True, scope="session")
def _plain_tracebacks() -> None:
    """structlog's default renders every local variable of every frame, which takes seconds for one exception."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


@pytest.fixture(autouse=True, scope="session")
def _statements_are_compiled_once() -> None:
    """All stores of a process share what SQLAlchemy has compiled, as all transactions of a server do. It compiles for
    an engine and its dialect, and each test has others: this took a sixth of the time of tests with a store."""
    database: Any = sys.modules.get("kinema.jobs.database")
    if database is None:
        return
    create_engine, shared = database.create_engine, {}

    def create(url: Any, **options: Any) -> Any:
        engine = create_engine(url, **options)
        first = shared.get(engine.dialect.name)
        if first is None or first.dialect.server_version_info is None:  # it has never connected
            shared[engine.dialect.name] = engine
        else:
            engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    database.create_engine = create


@pytest.fixture(autouse=True, scope="session")
def _no_name_service() -> Iterator[None]:
    """Only the names of this machine are known, as on a machine without a network: no test asks anybody else."""
    ask = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode("ascii") if isinstance(host, bytes) else host
        if name and name != "localhost" and not _is_address(name):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(host, *arguments, **options)

    socket.getaddrinfo = getaddrinfo
    yield
    socket.getaddrinfo = ask


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="session")
def forked_kinema() -> Iterator[list[str]]:
    """The beginning of a command line of ``kinema``, whose process is forked."""
    programs = ForkingPrograms(become_kinema)
    yield programs.command
    programs.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Started for the first test that asks for it."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A database of the test's own."""
    with postgres.database() as url:
        yield url
