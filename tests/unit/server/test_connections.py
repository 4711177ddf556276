"""Which connections there may be, and which of them give way."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from kinema.server import connections as module
from kinema.server.connections import Connections, Networks, Place
from kinema.settings import ServerSettings
from tests.serving import until


class Client:
    """A connection that remembers what became of it."""

    def __init__(self, address: str | None = "10.0.0.1") -> None:
        self.address = address
        self.gave_way = False
        self.num_looks = 0

    def give_way(self) -> None:
        self.gave_way = True

    def look(self, now: float) -> None:
        self.num_looks += 1


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARD_WITHIN_S", 0.0)


def open_to(connections: Connections, *clients: Client) -> list[Place]:
    """Ask for a place for each, and open it as the place allows."""
    places = []
    for client in clients:
        places.append(connections.make_place(client.address))
        connections.add(client, is_welcome=places[-1] is Place.FREE)
    return places


def make(room: int = 100, **settings: object) -> Connections:
    return Connections(ServerSettings(**settings), lambda: room)  # type: ignore[arg-type]


async def test_at_the_limit_the_one_that_is_idle_longest_gives_way() -> None:
    """Those for which the server works stay, however old they are."""
    first, second, third = (Client() for _ in range(3))
    connections = make(max_connections=2, max_connections_per_address=10)
    open_to(connections, first, second)
    connections.set_busy(first)
    assert open_to(connections, third) == [Place.FREE]
    assert [client.gave_way for client in (first, second, third)] == [False, True, False]


async def test_whoever_is_heard_again_is_idle_for_the_shortest_time() -> None:
    first, second = Client(), Client()
    connections = make(max_connections=2, max_connections_per_address=10)
    open_to(connections, first, second)
    connections.set_idle(first)
    open_to(connections, Client())
    assert (first.gave_way, second.gave_way) == (False, True)


async def test_without_an_idle_one_the_new_one_is_refused_and_gives_way_first() -> None:
    first, refused, later = Client(), Client(), Client()
    connections = make(max_connections=1)
    open_to(connections, first)
    connections.set_busy(first)
    assert open_to(connections, refused) == [Place.NONE]
    connections.remove(first)
    assert open_to(connections, later) == [Place.FREE]
    assert refused.gave_way


async def test_a_new_one_is_not_closed_before_it_can_be_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARD_WITHIN_S", 0.02)
    first = Client()
    connections = make(max_connections=1)
    open_to(connections, first)
    assert connections.make_place("10.0.0.2") is Place.SOON
    await until(lambda: connections.make_place("10.0.0.2") is Place.FREE)
    assert first.gave_way


async def test_one_address_has_half_of_all_by_default() -> None:
    """Its own connections give way to each other, and nobody else's."""
    others = [Client("10.0.0.2") for _ in range(2)]
    own = [Client("10.0.0.1") for _ in range(4)]
    connections = make(room=8)
    open_to(connections, *others, *own)
    assert not any(client.gave_way for client in own)
    open_to(connections, Client("10.0.0.1"))
    assert [client.gave_way for client in own] == [True, False, False, False]
    assert not any(client.gave_way for client in others)


async def test_an_ipv6_network_counts_as_one_address() -> None:
    first = Client("2001:db8::1")
    connections = make(max_connections_per_address=1)
    open_to(connections, first, Client("2001:db8::ffff:1"))
    assert first.gave_way


@pytest.mark.parametrize("address", ["10.1.2.3", None])
async def test_a_known_proxy_has_no_limit_of_its_own(address: str | None) -> None:
    """Nor has a socket without addresses: behind both are many clients."""
    clients = [Client(address) for _ in range(5)]
    connections = make(proxies="10.0.0.0/8", max_connections_per_address=1)
    assert open_to(connections, *clients) == [Place.FREE] * 5
    assert not any(client.gave_way for client in clients)


async def test_fewer_places_are_known_at_once() -> None:
    """The limit of files may be lowered from outside."""
    room = 4
    clients = [Client() for _ in range(4)]
    connections = Connections(ServerSettings(max_connections_per_address=9), lambda: room)
    open_to(connections, *clients)
    room = 2
    open_to(connections, Client())
    assert [client.gave_way for client in clients] == [True, True, True, False]


async def test_places_of_closed_ones_are_free_again() -> None:
    connections = make(max_connections=1)
    for _ in range(3):
        client = Client()
        assert open_to(connections, client) == [Place.FREE]
        connections.set_busy(client)
        connections.remove(client)
        connections.remove(client)


async def test_each_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.001)
    client, connections = Client(), make()
    open_to(connections, client)
    await until(lambda: client.num_looks >= 3)
    connections.remove(client)


def test_networks_know_their_addresses() -> None:
    networks = Networks("127.0.0.1, 10.0.0.0/8,::1")
    assert [text in networks for text in ("127.0.0.1", "10.9.9.9", "::1", "11.0.0.1", "fe80::1%eth0")] == [True] * 3 + [
        False
    ] * 2


@pytest.mark.parametrize("text", ["proxy", "10.0.0.1/8", "10.0.0.0/40"])
def test_what_is_no_network_stops_the_start(text: str) -> None:
    with pytest.raises(ValidationError, match="neither an IP address nor a network"):
        ServerSettings(proxies=text)
