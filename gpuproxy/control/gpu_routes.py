"""The rows of the table that are about GPUs and rentals."""

from gpuproxy.control import gpu_offers, gpu_rentals, gpu_renting
from gpuproxy.control.gpu_shapes import Logs, NewInstance, OfferInfo, RentalInfo, Reservation, Reserved
from gpuproxy.control.route import Route

GPU = "/api/v1/gpu"
GPU_ROUTES: tuple[Route, ...] = (
    Route(
        "GET", f"{GPU}/instances", gpu_offers.list_offers, "key", None, OfferInfo, "list", query=gpu_offers.LIST_QUERY
    ),
    Route(
        "POST",
        f"{GPU}/instances/reserve",
        gpu_renting.reserve,
        "account",
        Reservation,
        Reserved,
        status=201,
        is_once=True,
    ),
    Route("GET", f"{GPU}/instances/{{provider}}/{{id}}", gpu_offers.show_offer, "key", gives=OfferInfo),
    Route(
        "POST",
        f"{GPU}/instances/{{provider}}/{{id}}",
        gpu_renting.rent_offer,
        "account",
        NewInstance,
        RentalInfo,
        status=201,
        is_once=True,
    ),
    Route("DELETE", f"{GPU}/instances/{{provider}}/{{id}}", gpu_rentals.destroy, "account", gives=RentalInfo),
    Route(
        "GET",
        f"{GPU}/rentals",
        gpu_rentals.list_rentals,
        "read",
        None,
        RentalInfo,
        "list",
        query=gpu_rentals.RENTALS_QUERY,
    ),
    Route("GET", f"{GPU}/rentals/{{id}}", gpu_rentals.show_rental, "read", gives=RentalInfo),
    Route("GET", f"{GPU}/rentals/{{id}}/logs", gpu_rentals.show_logs, "read", gives=Logs, query=gpu_rentals.LOGS_QUERY),
    Route("POST", f"{GPU}/rentals/{{id}}/start", gpu_rentals.start, "account", gives=RentalInfo),
    Route("POST", f"{GPU}/rentals/{{id}}/stop", gpu_rentals.stop, "account", gives=RentalInfo),
)
