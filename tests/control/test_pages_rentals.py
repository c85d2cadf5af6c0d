"""Pages of rentals: what a provider says, and does not say, is shown."""

from datetime import datetime, timedelta

from gpuproxy.ledger.book import credit
from gpuproxy.store.schema import rentals

from .conftest import Api
from .test_pages import visit


async def test_a_machine_out_of_sight_is_shown_so(api: Api) -> None:
    ann = await api.person()
    await credit(api.store, ann.id, 100_000_000_000, "gift")
    _, offered = await api.call("GET", "/api/v1/gpu/instances?limit=1", headers=ann.by_key)
    path = f"/api/v1/gpu/instances/simulated/{offered['data'][0]['id']}"
    _, made = await api.call("POST", path, {"image": "x", "wait": 20}, ann.by_key)
    at = datetime.fromisoformat(made["seen_at"]) + timedelta(minutes=1)
    async with api.store.writing() as connection:
        await connection.execute(rentals.update().values(seen_at=at))
    for place in ("/dashboard/rentals", f"/dashboard/rentals/{made['contract_id']}"):
        assert ">unreachable<" in (await visit(api, place, ann.by_cookie)).text
    _, shown = await api.call("GET", f"/api/v1/gpu/rentals/{made['contract_id']}", headers=ann.by_key)
    assert (shown["data"]["status"], shown["data"]["unreachable_since"]) == ("running", made["seen_at"])
