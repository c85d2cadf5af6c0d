"""Limits of calls at once over several workers: never exceeded, all of it usable wherever the calls are."""

import asyncio
import random
from collections import deque
from typing import Any, cast

import pytest

from gpuproxy.config.routing import Routing
from gpuproxy.errors import GatewayError
from gpuproxy.link.client import LinkClient
from gpuproxy.link.messages import FreeSeats, GiveSeats, HoldSeats, Seats, WantSeats
from gpuproxy.link.seating import Seating
from gpuproxy.plugin import load_plugins
from gpuproxy.proxy.attempts import Attempts
from gpuproxy.proxy.breaker import Replicas
from gpuproxy.proxy.destination import Destination, Terms
from gpuproxy.proxy.endpoint import Endpoint
from gpuproxy.proxy.rooms import TURN_S, Rooms

HANDLER = load_plugins(["openinference"]).protocols["openinference"]


class Worker:
    """A worker's rooms, one destination, and calls that begin, wait and end there."""

    def __init__(self, epoch: str, machine: "Machine", limit: int, queue_max: int) -> None:
        self.epoch = epoch
        self.sent: deque[Any] = deque()
        self.received: deque[Any] = deque()
        self.running_count = 0
        self.connected = asyncio.Event()
        self.connected.set()
        self.rooms = Rooms(cast(LinkClient, self), machine.worker_count, lambda: machine.now_s)
        replicas = Replicas(Routing(), 1.0, self.rooms)
        self.replica = replicas.get("up", "http://a")
        endpoint = Endpoint(None, b"", 1, 1, self.replica)  # type: ignore[arg-type]  # nobody connects
        endpoint.room = self.rooms.of(self.replica, limit)
        terms = Terms(queue_max=queue_max)
        self.place = Destination("", "m", HANDLER, [endpoint], terms, replicas)

    @property
    def room(self) -> Any:
        (room,) = self.rooms
        return room

    def send(self, message: Any) -> None:
        """Take the place of the link."""
        if self.connected.is_set():
            self.sent.append(message)

    def call(self) -> None:
        """Begin a call, or let it wait. Raises GatewayError UPSTREAM_BUSY."""
        endpoint = self.place.choose(0, None)
        if endpoint is None:
            self.place.hold(cast(Attempts, Waiting(self)))
        else:
            self.begin()

    def begin(self) -> None:
        self.running_count += 1
        self.replica.begin()

    def end(self) -> None:
        self.running_count -= 1
        self.replica.end(self.replica.generation)


class Waiting:
    """A call in a queue."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def choose_from(self, destination: Destination) -> Endpoint | None:
        return destination.choose(0, None)

    def go_to(self, endpoint: Endpoint) -> None:
        self._worker.begin()


class Machine:
    """Workers, control, and what is on its way between them, each way in its order."""

    def __init__(self, limit: int, worker_count: int = 2, queue_max: int = 1_000) -> None:
        self.limit = limit
        self.now_s = 1.0
        self.worker_count = worker_count
        self._queue_max = queue_max
        self.workers: dict[str, Worker] = {}
        self.seating = Seating(self._push)
        self.seating.open()
        for number in range(worker_count):
            self.start(f"w{number}")

    def start(self, epoch: str) -> Worker:
        worker = self.workers[epoch] = Worker(epoch, self, self.limit, self._queue_max)
        return worker

    def __getitem__(self, number: int) -> Worker:
        return list(self.workers.values())[number]

    def _push(self, epoch: str, message: Seats | FreeSeats) -> bool:
        worker = self.workers.get(epoch)
        if worker is None or not worker.connected.is_set():
            return False
        worker.received.append(message)
        return True

    def deliver(self, worker: Worker) -> None:
        """Let the oldest message each way arrive."""
        if worker.sent:
            match worker.sent.popleft():
                case HoldSeats(place, count):
                    self.seating.hold(worker.epoch, place, count)
                case WantSeats(place, count, is_urgent):
                    self.seating.want(worker.epoch, place, count, is_urgent)
                case GiveSeats(place, count):
                    self.seating.give(worker.epoch, place, count)
        if worker.received:
            message = worker.received.popleft()
            (worker.rooms._take if isinstance(message, Seats) else worker.rooms._free)(message)

    def settle(self) -> None:
        """Let all arrive. What never comes to rest fails."""
        for _ in range(10_000):
            busy = [each for each in self.workers.values() if each.sent or each.received]
            if not busy:
                return
            self.deliver(busy[0])
        raise AssertionError("they talk for ever")

    def sweep(self) -> None:
        for worker in self.workers.values():
            worker.rooms.sweep()
        self.settle()

    @property
    def running_count(self) -> int:
        return sum(worker.running_count for worker in self.workers.values())

    @property
    def waiting_count(self) -> int:
        return sum(len(worker.place.waiting) for worker in self.workers.values())


def test_each_worker_begins_with_an_equal_part() -> None:
    machine = Machine(9, 4)
    machine.settle()
    assert [worker.room.seats for worker in machine.workers.values()] == [2, 2, 2, 2]


@pytest.mark.parametrize("limit", [1, 3, 4, 50])
def test_one_worker_may_use_the_whole_limit(limit: int) -> None:
    machine = Machine(limit, 3)
    machine.settle()
    for _ in range(limit):
        machine[1].call()
        machine.settle()
    assert machine.running_count == limit
    machine[1].call()
    machine[2].call()
    machine.settle()
    assert (machine.running_count, machine.waiting_count) == (limit, 2)


def test_a_seat_goes_to_a_call_that_waits_at_another_worker() -> None:
    machine = Machine(1)
    machine[0].call()
    machine.settle()
    machine[1].call()
    machine.settle()
    assert (machine[0].running_count, machine[1].running_count) == (1, 0)
    machine[0].end()
    machine.settle()
    assert (machine[0].running_count, machine[1].running_count) == (0, 1)


def test_workers_whose_calls_wait_take_turns() -> None:
    machine = Machine(1)
    for worker in machine.workers.values():
        for _ in range(4):
            worker.call()
    machine.settle()
    turns = []
    for _ in range(8):
        (busy,) = [each for each in machine.workers.values() if each.running_count]
        turns.append(busy.epoch)
        machine.now_s += TURN_S
        busy.end()
        machine.settle()
    assert turns.count("w0") == turns.count("w1") == 4
    assert not any(turns[at] == turns[at + 1] == turns[at + 2] for at in range(6)), turns
    assert machine.waiting_count == 0


def test_short_calls_do_not_wait_for_seats_on_their_way() -> None:
    machine = Machine(2)
    machine.settle()
    for worker in machine.workers.values():
        for _ in range(40):
            worker.call()
    machine.settle()
    passed = 0
    for _ in range(20):  # of a hundredth of a second each
        machine.now_s += TURN_S / 5
        for worker in machine.workers.values():
            if worker.running_count:
                worker.end()
                passed += sum(isinstance(message, GiveSeats) for message in worker.sent)
                machine.settle()
    assert machine.running_count == 2
    assert 0 < passed <= 10


def test_what_is_not_used_comes_back_but_for_a_last_seat() -> None:
    machine = Machine(8)
    for _ in range(8):
        machine[0].call()
        machine.settle()
    for _ in range(8):
        machine[0].end()
    for _ in range(3):
        machine.sweep()
    assert [worker.room.seats for worker in machine.workers.values()] == [1, 1]
    for _ in range(7):
        machine[1].call()
        machine.settle()
    assert machine[1].running_count == 7, "more is there as soon as it is needed"


def test_a_full_queue_asks_for_seats_too() -> None:
    machine = Machine(1, queue_max=0)
    machine.settle()
    there, elsewhere = sorted(machine.workers.values(), key=lambda worker: -worker.room.seats)
    there.call()
    there.end()
    with pytest.raises(GatewayError):
        elsewhere.call()
    machine.settle()
    elsewhere.call()
    assert elsewhere.running_count == 1


def test_a_worker_that_leaves_keeps_what_its_calls_need_and_no_more() -> None:
    machine = Machine(4)
    machine.settle()
    for _ in range(3):
        machine[0].call()
        machine.settle()
    machine[0].rooms.leave()
    successor = machine.start("w2")
    machine.settle()
    for _ in range(4):
        successor.call()
        machine.settle()
    assert (machine[0].running_count, successor.running_count) == (3, 1)
    for count in (2, 3, 4):
        machine[0].end()
        machine.settle()
        assert successor.running_count == count


def test_seats_of_a_worker_that_died_are_free() -> None:
    machine = Machine(2)
    machine.settle()
    for _ in range(2):
        machine[0].call()
        machine.settle()
    machine[1].call()
    machine.settle()
    del machine.workers["w0"]
    machine.seating.gone("w0")
    machine.settle()
    assert (machine.running_count, machine.waiting_count) == (1, 0)


def test_another_control_learns_what_is_held_before_it_hands_out() -> None:
    machine = Machine(2)
    machine.settle()
    for _ in range(2):
        machine[0].call()
        machine.settle()
    machine.seating = Seating(machine._push)
    machine[1].call()
    machine[1].rooms.report()
    machine.settle()
    assert machine.running_count == 2, "nothing is handed out before all could tell"
    machine[0].rooms.report()
    machine.settle()
    machine.seating.open()
    machine.settle()
    assert (machine.running_count, machine.waiting_count) == (2, 1)
    machine[0].end()
    machine.settle()
    assert (machine[1].running_count, machine.waiting_count) == (1, 0)


def test_without_control_each_goes_on_with_what_it_has() -> None:
    machine = Machine(4)
    machine.settle()
    for worker in machine.workers.values():
        worker.connected.clear()
        for _ in range(3):
            worker.call()
    assert (machine.running_count, machine.waiting_count) == (4, 2)


def test_no_seat_is_given_up_to_a_control_that_is_away() -> None:
    machine = Machine(2)
    machine.settle()
    for _ in range(2):
        for worker in machine.workers.values():
            worker.call()
    machine.settle()
    assert (machine.running_count, machine.waiting_count) == (2, 2), "each is asked for what the other wants"
    for worker in machine.workers.values():
        worker.connected.clear()
    for worker in machine.workers.values():
        worker.end()
        worker.rooms.sweep()
    assert (machine.running_count, machine.waiting_count) == (2, 0)


def test_calls_that_run_under_a_limit_that_is_new_are_counted() -> None:
    machine = Machine(4)
    machine.settle()
    for _ in range(4):
        machine[0].call()
        machine.settle()
    lower = machine[0].rooms.of(machine[0].replica, 2)
    assert lower is not None
    other = machine[1].rooms.of(machine[1].replica, 2)
    assert other is not None
    other.want(1, is_urgent=True)
    machine.settle()
    assert (lower.seats, other.seats) == (4, 0)
    for _ in range(2):
        machine[0].end()
        lower.moved(machine[0].place.endpoints[0], -1)
        machine.settle()
        assert other.seats == 0
    machine[0].end()
    lower.moved(machine[0].place.endpoints[0], -1)
    machine.settle()
    assert (lower.seats, other.seats) == (1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_the_limit_holds_and_nobody_waits_for_ever_whatever_comes_first(seed: int) -> None:
    random_ = random.Random(seed)
    limit = random_.choice([1, 2, 3, 5, 8, 13])
    machine = Machine(limit, random_.choice([1, 2, 3, 5]))
    for number in range(2_000):
        worker = machine[random_.randrange(len(machine.workers))]
        what = random_.random()
        if what < 0.3:
            worker.call()
        elif what < 0.6 and worker.running_count:
            worker.end()
        elif what < 0.62:
            worker.rooms.sweep()
        elif what < 0.63 and number % 7 == 0:
            worker.rooms.leave()
            machine.start(f"s{number}")
        else:
            machine.deliver(worker)
        assert machine.running_count <= limit
    while machine.waiting_count:
        machine.settle()
        assert machine.running_count == limit, "nobody waits while there is room"
        busy = [worker for worker in machine.workers.values() if worker.running_count]
        random_.choice(busy).end()
    machine.settle()
