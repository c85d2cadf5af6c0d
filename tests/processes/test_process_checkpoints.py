"""A worker that is killed takes no open call with it: what the client got is charged from the last checkpoint, once."""

import asyncio

from callers import HELD, CutError
from clients.gateway import toml_table
from conftest import MakeCaller, MakePlace
from gateways import Place, kill, running, until
from inference import Inference

from gpuproxy.access.accounts import find_user
from gpuproxy.ledger.book import credit
from gpuproxy.store.engine import open_store

PRICE = toml_table("[[prices]]", {"model": "mock-model", "output_usd_per_million": "1000"})
MONEY_NANOUSD = 10 * 10**9


async def test_an_open_call_of_a_killed_worker_is_charged_once(
    place: MakePlace, new_caller: MakeCaller, inference: Inference
) -> None:
    here = place(server={"workers": 1})
    here.configure(tail=PRICE)
    await _give_credit(here)
    inference.hold()
    with running(here) as gateway:
        call = asyncio.create_task(new_caller(gateway).post(HELD))
        try:
            await until(lambda: here.query("SELECT id FROM open_calls"), 20, "a checkpoint is stored")
            ((call_id,),) = here.query("SELECT id FROM open_calls")
            kill(gateway.workers()[0])
            (error,) = await asyncio.gather(call, return_exceptions=True)
            assert isinstance(error, CutError)
            await until(here.receipts, 20, "the call is settled")
        finally:
            call.cancel()
            inference.release()
        assert gateway.stop() == 0
    (receipt,) = here.receipts()
    assert (receipt.id, receipt.outcome, receipt.output_tokens) == (call_id, "upstream_failed", 1)
    told = "SELECT error, cost_nanousd FROM receipts"
    assert here.query(told) == [("WORKER_LOST", 10**6)]
    assert here.query("SELECT posted_nanousd FROM accounts WHERE kind = 'credit'") == [(MONEY_NANOUSD - 10**6,)]
    assert here.query("SELECT COUNT(*) FROM open_calls") == [(0,)]
    assert here.command("ledger", "verify") == "no fault"


async def _give_credit(here: Place) -> None:
    store = open_store(f"sqlite:///{here.database}")
    try:
        await credit(store, (await find_user(store, "caller@example.com")).id, MONEY_NANOUSD, "start")
    finally:
        await store.close()
