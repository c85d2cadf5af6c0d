"""Every call a client saw complete has exactly one receipt, whatever is killed when.

GPUPROXY_TEST_KILLS sets how many processes die; the default keeps the run short.
"""

import os
import random
import signal
from collections import Counter

from callers import CHAT, STREAM, Answer, Caller, Load
from conftest import MakePlace
from gateways import Gateway, Place, Receipt, children, kill, running, until
from inference import INPUT_TOKENS, JSON_BODY, OUTPUT_TOKENS, STREAM_BODY

KILLS = int(os.environ.get("GPUPROXY_TEST_KILLS", "24"))
SEED = int(os.environ.get("GPUPROXY_TEST_SEED", "1"))
WORKERS = 4


async def stream(caller: Caller) -> Answer:
    return await caller.post(STREAM)


async def chat(caller: Caller) -> Answer:
    return await caller.post(CHAT)


async def test_every_complete_call_has_exactly_one_receipt_whatever_is_killed(place: MakePlace) -> None:
    here = place(server={"workers": WORKERS}, journal={"segment_bytes": 16384, "ingest_s": 0.02})
    chance = random.Random(SEED)
    with running(here) as gateway:
        files = gateway.open_files()
        async with Load(gateway.port, here.key) as load:
            load.add(6, chat)
            load.add(4, stream)
            load.add(2, chat, is_kept_alive=False)
            victims = await killed(gateway, chance, load)
        await until(lambda: len(children(gateway.process.pid)) == WORKERS + 1, 15, "every process is back")
        await until(lambda: gateway.open_files() == files, 5, "the supervisor keeps no files of the dead")
        complete = {answer.request_id: answer for answer in load.answers if answer.status == 200}
        await until(lambda: not of_the_dead(here, gateway), 15, "only segments of living workers are left")
        assert gateway.stop() == 0
    receipts = here.receipts()
    assert victims >= KILLS
    assert len(complete) > 20 * KILLS
    assert_each_counts_once(complete, receipts)
    assert not any(here.segments().values())


async def killed(gateway: Gateway, chance: random.Random, load: Load) -> int:
    """Kill children at random moments under load, the next one as soon as there is one; return how many."""
    count = 0
    while count < KILLS:
        served = len(load.answers) + chance.randrange(5, 100)
        await until(lambda enough=served: len(load.answers) >= enough, 20, "calls are served between two kills")
        living = children(gateway.process.pid)
        if living:
            kill(chance.choice(living), signal.SIGKILL)
            count += 1
    return count


def of_the_dead(here: Place, gateway: Gateway) -> list[str]:
    """Name the files of the journal that belong to no living worker."""
    here.age_empty_segments()
    living = {str(pid) for pid in gateway.workers()}
    return [name for name in here.segments() if name.split("-")[2] not in living]


def assert_each_counts_once(complete: dict[str, Answer], receipts: list[Receipt]) -> None:
    times = Counter(receipt.request_id for receipt in receipts)
    assert [request_id for request_id in complete if times[request_id] != 1] == []
    assert len({receipt.id for receipt in receipts}) == len(receipts)
    for receipt in receipts:
        answer = complete.get(receipt.request_id)
        if answer is None:
            continue
        assert answer.body in (JSON_BODY, STREAM_BODY)
        expected = (200, "ok", len(answer.body), INPUT_TOKENS, OUTPUT_TOKENS)
        assert receipt[2:] == expected, receipt
