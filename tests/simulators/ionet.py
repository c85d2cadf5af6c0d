"""io.net's enterprise API over HTTP: catalogue, prices, containers and VMs, as its published schemas have them.

No client of the vendor's exists to try it with, so it is as faithful as the schemas are: FastAPI's 422, ``detail``
otherwise, ``data`` around nearly everything, statuses with spaces, some times without a zone. A deployment is paid
in full at once, runs after a while, completes when its hours are over. What stands behind undocumented moments
(no capacity, no credit) is a guess, marked so.
"""

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from simulators.faults import Asked, Faults, Handler, html, spoil

KEY = "ionet-key-hunter2"
HOUR_S = 3_600.0
BOOT_S = 30.0  # from "deployment requested" to "running"
URL_S = 5.0  # from there to a public_url
END_S = 10.0  # from "termination requested" to "destroyed"
PLACES = {"US": 7, "CA": 8, "FI": 9, "DE": 10}
ROOT = "/enterprise/v1/io-cloud"
# name, GB, dollars an hour for one, cards, country
MODELS = (
    ("GeForce RTX 4090", 24, 0.3, 1, "US"),
    ("GeForce RTX 4090", 24, 0.3, 2, "US"),
    ("GeForce RTX 3090", 24, 0.2, 1, "CA"),
    ("L40S", 48, 0.8, 1, "DE"),
    ("A100-SXM4-80GB", 80, 1.3, 1, "FI"),
    ("A100-SXM4-80GB", 80, 1.3, 8, "US"),
    ("H100 PCIe", 80, 2.1, 1, "US"),
    ("H100 PCIe", 80, 2.1, 8, "FI"),
    ("RTX A6000", 48, 0.5, 1, "US"),
)
DEPLOY_FIELDS = {
    "resource_private_name",
    "duration_hours",
    "gpus_per_container",
    "hardware_id",
    "location_ids",
    "container_config",
    "registry_config",
}


@dataclass
class Life:
    """One deployment."""

    id: str
    name: str
    row: dict[str, Any]
    body: dict[str, Any]
    kind: str
    created_s: float
    hours: float
    paid: float
    number: int
    ended_s: float | None = None
    is_broken: bool = False
    container_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def status(self, now_s: float) -> str:
        """Return the status."""
        if self.ended_s is not None:
            return "destroyed" if now_s >= self.ended_s + END_S else "termination requested"
        if now_s < self.created_s + BOOT_S:
            return "deployment requested"
        if self.is_broken:
            return "failed"
        return "completed" if now_s >= self.until_s() else "running"

    def until_s(self) -> float:
        """Return when its hours are over."""
        return self.created_s + BOOT_S + self.hours * HOUR_S

    def served_min(self, now_s: float) -> float:
        """Return the minutes it has run."""
        end_s = min(now_s, self.until_s(), self.ended_s if self.ended_s is not None else now_s)
        return max(0.0, end_s - self.created_s - BOOT_S) / 60


def reply(body: Any, status: int = 200, **headers: str) -> web.Response:
    """Return JSON."""
    return web.json_response(body, status=status, headers=headers)


def detail(status: int, message: Any, **headers: str) -> web.Response:
    """Return a failure as FastAPI words it."""
    return reply({"detail": message}, status, **headers)


def unprocessable(*place: str, message: str = "Field required", kind: str = "missing") -> web.Response:
    """Return FastAPI's 422."""
    return detail(422, [{"loc": ["body", *place], "msg": message, "type": kind}])


class IoNetSimulator:
    """The server and its state."""

    def __init__(self, now_s: Callable[[], float], seed: int = 1) -> None:
        self.now_s = now_s
        self.credit = 10_000.0
        self.has_text_ids = False  # as later schemas have them
        self.refunds = False  # what is given back after the first hour is not documented
        self.lives: dict[str, Life] = {}
        self.faults = Faults()
        self._dice = random.Random(seed)
        self.rows = [self._row(number, *model) for number, model in enumerate(MODELS)] + odd_rows()
        self.server = TestServer(self._app())

    async def start(self) -> str:
        """Listen and return the base URL."""
        await self.server.start_server()
        return str(self.server.make_url("")).rstrip("/")

    async def close(self) -> None:
        """Stop listening."""
        await self.server.close()

    def _row(self, number: int, name: str, vram: int, price: float, cards: int, place: str) -> dict[str, Any]:
        return {
            "id": f"{12 + number}__{cards}",
            "deploy_id": 12 + number,
            "name": name,
            "num_cards": cards,
            "supplier": "internal",
            "sold_out": False,
            "price": round(price * cards * self._dice.uniform(0.9, 1.1), 6),
            "vram_per_card": vram,
            "interconnect": None,
            "nvlink": False,
            "storage": 500,
            "vcpu": 39,
            "memory": 125,
            "location": place,
            "available": 1,
        }

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        for method, path, handler, name in (
            ("GET", "/v1/io-cloud/{line:vmaas|caas}/hardware", self.hardware, "public_hardware"),
            ("GET", ROOT + "/vmaas/hardware", self.hardware, "hardware"),
            ("GET", ROOT + "/{line:vmaas|caas}/hardware/max-gpus-per-{unit:vm|container}", self.most, "most"),
            ("GET", ROOT + "/caas/available-replicas", self.replicas, "replicas"),
            ("GET", ROOT + "/vmaas/available-vms", self.replicas, "replicas"),
            ("GET", ROOT + "/{line:vmaas|caas}/price", self.price, "price"),
            ("POST", ROOT + "/{line:vmaas|caas}/deploy", self.deploy, "deploy"),
            ("GET", ROOT + "/{line:vmaas|caas}/deployments", self.deployments, "list"),
            ("GET", ROOT + "/{line:vmaas|caas}/deployment/{id}", self.deployment, "show"),
            ("GET", ROOT + "/caas/deployment/{id}/containers", self.containers, "containers"),
            ("GET", ROOT + "/vmaas/deployment/{id}/vms", self.vms, "vms"),
            ("GET", ROOT + "/caas/deployment/{id}/log/{container}", self.log, "log"),
            ("PATCH", ROOT + "/caas/deployment/{id}", self.update, "update"),
            ("POST", ROOT + "/{line:vmaas|caas}/deployment/{id}/extend", self.extend, "extend"),
            ("DELETE", ROOT + "/{line:vmaas|caas}/deployment/{id}", self.destroy, "destroy"),
        ):
            app.router.add_route(method, path, self._named(name, handler))
        return app

    def _named(self, name: str, handler: Handler) -> Handler:
        async def run(request: web.Request) -> web.StreamResponse:
            text = await request.text()
            headers = {field.lower(): value for field, value in request.headers.items()}
            body = json.loads(text) if text else None
            self.faults.asked.append(Asked(name, request.method, request.path, dict(request.query), headers, body))
            if name != "public_hardware" and request.headers.get("x-api-key") != KEY:
                return detail(401, "Invalid API key")
            kind = self.faults.take(name)
            if kind is None:
                return await handler(request)
            return self._fault(kind) or await self._wrong(kind, name, request, handler)

        return run

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return html(404)
        except (json.JSONDecodeError, ValueError) as error:
            return detail(422, [{"loc": ["query"], "msg": str(error), "type": "value_error"}])

    def _fault(self, kind: str) -> web.Response | None:
        answers: dict[str, Callable[[], web.Response]] = {
            "auth_401": lambda: detail(401, "Invalid API key"),
            "auth_403": lambda: detail(403, "Forbidden"),
            "project_400": lambda: detail(400, "API key is not valid for this project"),
            "429": lambda: detail(429, "Too Many Requests"),
            "429_retry_after": lambda: detail(429, "Too Many Requests", **{"Retry-After": "7"}),
            "500_json": lambda: detail(500, "Internal Server Error"),
            "no_capacity": lambda: detail(400, "The selected hardware is not available"),
            "no_credit": lambda: detail(400, "Insufficient balance"),
            "conflict": lambda: detail(409, "Name already exists"),
            "422": lambda: unprocessable("hardware_id", message="Input should be a valid integer", kind="int_type"),
            "404": lambda: detail(404, "Deployment not found"),
        }
        return answers[kind]() if kind in answers else None

    async def _wrong(self, kind: str, name: str, request: web.Request, handler: Handler) -> web.StreamResponse:
        if kind == "lose" and name == "deploy":
            return reply({"status": "succeeded", "deployment_id": str(uuid.UUID(int=7))})
        if kind == "lose":
            return reply({"status": "succeeded", "deployment_id": request.match_info.get("id", "")})
        if kind == "empty":
            return reply({"data": {"deployments": [], "total": len(self.lives), "hardware": [], "statuses": []}})
        if kind == "no_data":
            return reply({"status": "succeeded"})
        if kind == "other_row":
            life = next(iter(self.lives.values()))
            return reply({"data": self._detail(life) | {"id": str(uuid.UUID(int=8))}})
        if kind == "odd_status":
            life = next(iter(self.lives.values()))
            return reply({"data": self._detail(life) | {"status": "hibernating"}})
        return await spoil(kind, request, handler)

    async def hardware(self, request: web.Request) -> web.Response:
        """GET hardware: filters are optional and loose."""
        rows = [row | {"sold_out": row["sold_out"] or self._left(row) < 1} for row in self.rows]
        if text := request.query.get("gpu"):
            rows = [row for row in rows if text.lower() in row["name"].lower()]
        if least := request.query.get("gpu_memory_min"):
            rows = [row for row in rows if row["vram_per_card"] >= int(least)]
        if self.has_text_ids:
            rows = [row | {"deploy_id": str(row["deploy_id"])} for row in rows]
        return reply({"data": {"hardware": [without(row, "available") for row in rows]}})

    def _left(self, row: dict[str, Any]) -> int:
        now_s = self.now_s()
        alive = [life for life in self.lives.values() if life.status(now_s) in ("deployment requested", "running")]
        return int(row.get("available", 1)) - sum(1 for life in alive if life.row["id"] == row["id"])

    async def most(self, request: web.Request) -> web.Response:
        """GET max-gpus-per-container."""
        unit = request.match_info["unit"]
        found = [
            {
                f"max_gpus_per_{unit}": row["num_cards"],
                "available": self._left(row),
                "hardware_id": row["deploy_id"],
                "hardware_name": row["name"],
                "brand_name": "NVIDIA",
            }
            for row in self.rows
            if isinstance(row["deploy_id"], int) and row["num_cards"]
        ]
        return reply({"data": {"hardware": found, "total": len(found)}})

    def _by_id(self, text: str, cards: int) -> dict[str, Any] | None:
        rows = (row for row in self.rows if str(row["deploy_id"]) == text and row["num_cards"] == cards)
        return next(rows, None)

    async def replicas(self, request: web.Request) -> web.Response:
        """GET available-replicas."""
        row = self._by_id(request.query["hardware_id"], int(request.query.get("hardware_qty", "1")))
        if row is None:
            return reply({"data": []})
        names = {"US": "United States", "CA": "Canada", "FI": "Finland", "DE": "Germany"}
        left = {place: (self._left(row) if place == row["location"] else 0) for place in PLACES}
        found = [
            {"id": id, "iso2": iso2, "name": names[iso2], "available_replicas": left[iso2]}
            for iso2, id in PLACES.items()
        ]
        if self.has_text_ids:
            found = [without(place, "iso2") | {"id": place["iso2"]} for place in found]
        return reply({"data": found})

    async def price(self, request: web.Request) -> web.Response:
        """GET price: the prepaid total."""
        query = request.query
        places = json.loads(query["location_ids"])
        cards = int(query.get("gpus_per_container") or query["gpus_per_vm"])
        row = self._by_id(query["hardware_id"], cards)
        if row is None or not places:
            return unprocessable("hardware_id", message="Hardware not found", kind="value_error")
        total = row["price"] * float(query["duration_hours"]) * int(query.get("replica_count", "1"))
        quote = {
            "replica_count": 1,
            "gpus_per_container": cards,
            "available_replica_count": [self._left(row)],
            "discount": 0,
            "ionet_fee": 0.0,
            "ionet_fee_percent": 0.25,
            "currency_conversion_fee": 0,
            "currency_conversion_fee_percent": 0,
            "total_cost_usdc": total,
        }
        return reply({"data": quote})

    async def deploy(self, request: web.Request) -> web.Response:
        """POST deploy: strict about its fields, paid at once."""
        body, kind = await request.json(), request.match_info["line"]
        if refused := refuse_deploy(body, kind, str if self.has_text_ids else int):
            return refused
        cards = body.get("gpus_per_container") or body.get("gpus_per_vm")
        row = self._by_id(str(body["hardware_id"]), cards)
        place = row and (row["location"] if self.has_text_ids else PLACES.get(row["location"]))
        if row is None or place not in body.get("location_ids", [PLACES["US"]]):
            return unprocessable("hardware_id", message="Hardware not found in location", kind="value_error")
        if any(life.name == body["resource_private_name"] for life in self.lives.values()):
            return detail(409, "Resource private name already exists")
        if self._left(row) < 1:
            return detail(400, "The selected hardware is not available")  # a guess
        paid = row["price"] * body["duration_hours"]
        if paid > self.credit:
            return detail(400, "Insufficient balance")  # a guess
        self.credit -= paid
        life = self._made(row, body, kind, paid)
        return reply({"status": "succeeded", "deployment_id": life.id})

    def _made(self, row: dict[str, Any], body: dict[str, Any], kind: str, paid: float) -> Life:
        id, number = str(uuid.UUID(int=self._dice.getrandbits(128), version=4)), len(self.lives)
        name, hours = body["resource_private_name"], body["duration_hours"]
        self.lives[id] = Life(id, name, row, body, kind, self.now_s(), hours, paid, number)
        return self.lives[id]

    async def deployments(self, request: web.Request) -> web.Response:
        """GET deployments: pages from 0."""
        page, size = int(request.query.get("page", "0")), int(request.query.get("page_size", "10"))
        if page < 0 or not 1 <= size <= 100:
            return unprocessable("page_size", message="Input should be less than or equal to 100")
        now_s, wanted = self.now_s(), request.query.get("status")
        lives = [life for life in self.lives.values() if life.kind == request.match_info["line"]]
        lives = [life for life in lives if wanted in (None, "", life.status(now_s))]
        rows = [self._listed(life) for life in lives[page * size : (page + 1) * size]]
        return reply(
            {"data": {"deployments": rows, "total": len(lives), "statuses": sorted({r["status"] for r in rows})}}
        )

    def _listed(self, life: Life) -> dict[str, Any]:
        now_s = self.now_s()
        served = life.served_min(now_s)
        return {
            "id": life.id,
            "status": life.status(now_s),
            "name": life.name,
            "completed_percent": round(100 * served / (life.hours * 60), 2),
            "hardware_quantity": life.row["num_cards"],
            "brand_name": "NVIDIA",
            "hardware_name": life.row["name"],
            "compute_minutes_served": served,
            "compute_minutes_remaining": life.hours * 60 - served,
        }

    def _detail(self, life: Life) -> dict[str, Any]:
        now_s = self.now_s()
        runs_s = life.created_s + BOOT_S
        ended_s = life.ended_s if life.ended_s is not None else life.until_s()
        config, registry = life.body.get("container_config", {}), life.body.get("registry_config", {})
        return without(self._listed(life), "name", "hardware_quantity") | {
            "created_at": time_text(life.created_s, life.number),
            "started_at": time_text(runs_s, life.number) if now_s >= runs_s and not life.is_broken else None,
            "finished_at": time_text(ended_s, life.number) if now_s >= ended_s else None,
            "amount_paid": life.paid,
            "total_gpus": life.row["num_cards"],
            "gpus_per_container": life.row["num_cards"],
            "total_containers": 1,
            "hardware_id": life.row["deploy_id"],
            "locations": [{"id": PLACES[life.row["location"]], "iso2": life.row["location"], "name": "somewhere"}],
            "container_config": {
                "entrypoint": config.get("entrypoint", []),
                "env_variables": config.get("env_variables", {}),
                "traffic_port": config.get("traffic_port"),
                "image_url": registry.get("image_url"),
                "secret_env_keys": sorted(config.get("secret_env_variables", {})),
            },
        }

    def _life(self, request: web.Request) -> Life:
        life = self.lives.get(request.match_info["id"])
        if life is None:
            text = json.dumps({"detail": "Deployment not found"})
            raise NotThere(text=text, content_type="application/json")
        return life

    async def deployment(self, request: web.Request) -> web.Response:
        """GET deployment/{id}."""
        return reply({"data": self._detail(self._life(request))})

    async def containers(self, request: web.Request) -> web.Response:
        """GET containers: public_url is null until the container is up."""
        life, now_s = self._life(request), self.now_s()
        is_up = life.status(now_s) == "running" and now_s >= life.created_s + BOOT_S + URL_S
        worker = {
            "device_id": f"dev-{life.number}",
            "container_id": life.container_id,
            "hardware": life.row["name"],
            "brand_name": "NVIDIA",
            "created_at": time_text(life.created_s, life.number),
            "uptime_percent": 100,
            "gpus_per_container": life.row["num_cards"],
            "status": "running" if is_up else "starting",
            "container_events": [{"time": time_text(life.created_s, life.number), "message": "Image pulled"}],
            "public_url": f"https://{life.container_id[:12]}.containers.example.io" if is_up else None,
        }
        workers = [worker] if now_s >= life.created_s + BOOT_S else []
        return reply({"data": {"total": len(workers), "workers": workers}})

    async def vms(self, request: web.Request) -> web.Response:
        """GET vms."""
        life = self._life(request)
        services = life.body.get("network_services", {})
        outside = {
            name: {**each, "public_port": 30_000, "public_ip": "198.51.100.9"} for name, each in services.items()
        }
        worker = {"vm_id": life.container_id, "status": "running", "ssh_access": "ssh x", "network_services": outside}
        return reply({"data": {"total": 1, "workers": [worker]}})

    async def log(self, request: web.Request) -> web.Response:
        """GET log: raw text."""
        life = self._life(request)
        if request.match_info["container"] != life.container_id:
            return detail(404, "Container not found")
        return web.Response(text="".join(f"line {number}\n" for number in range(1, 11)))

    async def update(self, request: web.Request) -> web.Response:
        """PATCH deployment/{id}."""
        return reply({"status": "succeeded", "deployment_id": self._life(request).id})

    async def extend(self, request: web.Request) -> web.Response:
        """POST extend: paid at once as well."""
        life, hours = self._life(request), (await request.json()).get("duration_hours", 0)
        if hours < 1:
            return unprocessable("duration_hours", message="Input should be greater than 0")
        paid = life.row["price"] * hours
        self.credit -= paid
        life.paid, life.hours = life.paid + paid, life.hours + hours
        return reply({"status": "succeeded", "deployment_id": life.id})

    async def destroy(self, request: web.Request) -> web.Response:
        """DELETE deployment/{id}."""
        life, now_s = self._life(request), self.now_s()
        if life.status(now_s) in ("destroyed", "completed", "termination requested"):
            return detail(400, "Deployment is already terminated")
        life.ended_s = now_s
        unused_h = life.hours - max(1.0, life.served_min(now_s) / 60)
        if self.refunds and unused_h > 0:
            self.credit += life.paid * unused_h / life.hours
        return reply({"status": "succeeded", "deployment_id": life.id})


class NotThere(web.HTTPException):
    """404 with FastAPI's body, told apart from a path that does not exist."""

    status_code = 404


def refuse_deploy(body: dict[str, Any], kind: str, id_type: type) -> web.Response | None:
    """Return the 422 for a body that is not as the schema has it."""
    if kind != "caas":
        return None
    for name in ("resource_private_name", "duration_hours", "gpus_per_container", "hardware_id", "location_ids"):
        if name not in body:
            return unprocessable(name)
    if extra := set(body) - DEPLOY_FIELDS:
        return unprocessable(extra.pop(), message="Extra inputs are not permitted", kind="extra_forbidden")
    if not isinstance(body["hardware_id"], id_type):
        return unprocessable("hardware_id", message="Input should be a valid integer", kind="int_type")
    if not 1 <= body["gpus_per_container"] <= 8 or not 1 <= body["duration_hours"] <= 8_760:
        return unprocessable("gpus_per_container", message="Input is out of range", kind="value_error")
    if len(body["location_ids"]) != 1:
        return unprocessable("location_ids", message="List should have exactly one item", kind="too_long")
    if not body.get("registry_config", {}).get("image_url"):
        return unprocessable("registry_config", "image_url")
    return None


def odd_rows() -> list[dict[str, Any]]:
    """Return rows as the live catalogue has them that nobody can rent as a container."""
    plain = {"supplier": "external", "sold_out": False, "interconnect": "sxm5", "nvlink": True, "location": "FI"}
    return [
        plain
        | {"id": "8H100.80S.176V__FI", "deploy_id": "8H100.80S.176V", "name": "H100", "num_cards": 8}
        | {"price": 27.875342465753423, "vram_per_card": 80, "storage": 2000, "vcpu": 176, "memory": 1480},
        plain
        | {"id": "cpu__1", "deploy_id": 90, "name": "EPYC", "num_cards": 0, "price": 0.1}
        | {"vram_per_card": 0, "storage": 100, "vcpu": 32, "memory": 64},
        plain
        | {"id": "free__1", "deploy_id": 91, "name": "GeForce RTX 4090", "num_cards": 1, "price": 0}
        | {"vram_per_card": 24, "storage": 100, "vcpu": 32, "memory": 64},
        plain
        | {"id": "sold__1", "deploy_id": 92, "name": "H200", "num_cards": 1, "price": 3.0, "sold_out": True}
        | {"vram_per_card": 141, "storage": 100, "vcpu": 32, "memory": 64},
    ]


def time_text(seconds: float, number: int) -> str:
    """Return a time, every other one without a zone as some answers have it."""
    told = datetime.fromtimestamp(seconds, UTC)
    return told.isoformat() if number % 2 else told.replace(tzinfo=None).isoformat()


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a row without some of its fields."""
    return {name: value for name, value in row.items() if name not in names}
