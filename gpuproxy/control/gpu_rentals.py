"""The caller's rentals: ``/api/v1/gpu/rentals``, and their end. What it does is in `gpuproxy.fleet.care`."""

from typing import Any

from aiohttp import web

from gpuproxy.control.gpu_offers import flag
from gpuproxy.control.gpu_shapes import Logs, rental_info
from gpuproxy.control.parts import CALLER, FLEET
from gpuproxy.control.query import count_asked, page_asked
from gpuproxy.control.respond import answer, success
from gpuproxy.errors import GatewayError
from gpuproxy.fleet import care, rentals
from gpuproxy.fleet.parts import failure_of
from gpuproxy.fleet.rentals import Rental
from gpuproxy.fleet.states import ENDED
from gpuproxy.observe.logs import get_logger
from gpuproxy.plugin import ProviderError

LINES_DEFAULT, LINES_MAX = 100, 5_000
LOG_CHARACTERS_MAX = 1 << 20  # however long the lines are
RENTALS_QUERY = {
    "limit": "how many, 1 to 1000; 100 if left out",
    "cursor": "the next_cursor of the page before",
    "living": "true: without those that have ended",
}
LOGS_QUERY = {"tail": f"how many of the last lines, 1 to {LINES_MAX}; {LINES_DEFAULT} if left out"}

logger = get_logger(__name__)


async def list_rentals(request: web.Request) -> web.Response:
    """List the caller's rentals, oldest first, also those that have ended."""
    page = page_asked(request)
    is_living = flag(request, "living")
    found = await request.app[FLEET].read(rentals.page_of_user, request[CALLER].user_id, page, bool(is_living))
    shown = [rental_info(rental) for rental in found]
    fields: dict[str, Any] = {"data": shown, "count": len(shown), "status": "success"}
    return answer(fields | ({"next_cursor": found[-1].id} if len(found) == page.limit else {}))


async def show_rental(request: web.Request) -> web.Response:
    """Show a rental."""
    return success(rental_info(await _own(request)))


async def show_logs(request: web.Request) -> web.Response:
    """Show the last lines of what a machine printed."""
    rental = await _own(request)
    tail = count_asked(request, "tail", LINES_DEFAULT, LINES_MAX)
    if not rental.native_id or rental.state in ENDED:
        raise GatewayError("CONFLICT", f"rental {rental.id} is {rental.state}; it has no log")
    try:
        text = await request.app[FLEET].adapter_of(rental).logs(rental.native_id, tail)
    except ProviderError as error:
        logger.warning("provider shows no log", contract_id=rental.id, error=str(error))
        raise failure_of(error) from error
    return success(Logs(rental.id, text[-LOG_CHARACTERS_MAX:]))


async def start(request: web.Request) -> web.Response:
    """Start a stopped machine."""
    return success(rental_info(await care.start(request.app[FLEET], await _own(request))))


async def stop(request: web.Request) -> web.Response:
    """Stop a running machine; its storage goes on costing."""
    return success(rental_info(await care.stop(request.app[FLEET], await _own(request))))


async def destroy(request: web.Request) -> web.Response:
    """Destroy a rental for good; it costs nothing from now on. Again changes nothing."""
    return success(rental_info(await care.destroy(request.app[FLEET], await _own_at(request))))


async def _own_at(request: web.Request) -> Rental:
    """Return the caller's rental at the provider in the path; one that is switched off is found by the rental."""
    fleet, name = request.app[FLEET], request.match_info["provider"]
    if not fleet.knows(name):
        rental = await _own(request)
        if rental.provider not in fleet.providers:
            return rental
    return await _own(request, fleet.adapter(name).name)


async def _own(request: web.Request, provider: str | None = None) -> Rental:
    name, user_id = request.match_info["id"], request[CALLER].user_id
    rental: Rental = await request.app[FLEET].read(rentals.named, name, user_id, provider)
    return rental
