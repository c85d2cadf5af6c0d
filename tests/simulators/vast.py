"""vast.ai over HTTP, for real: its routes, bodies, statuses, content types, limits and odd answers.

Faithful to what the vendor's documentation and client 1.9.1 say and to what others have seen of the live API in 2026.
The content type must be exactly ``application/json``, or the vendor's own client shows nothing.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from simulators.faults import Asked, Faults, Handler, html, spoil
from simulators.vast_market import Life, Market
from simulators.vast_search import SearchError, fits, search

KEY = "vast-key-hunter2"
PAGE_MAX = 25
STORED = ("id", "label", "actual_status", "gpu_name", "verification")  # columns a list can be filtered by
THRESHOLDS_S = {"search": 6.0, "create": 4.5, "list": 1.0, "show": 2.0, "change": 1.0, "destroy": 3.0, "charges": 1.0}
OPEN = ("search", "gpu_names", "gpu_types", "log_file")  # need no key


def reply(body: Any, status: int = 200, **headers: str) -> web.Response:
    """Return JSON with the one content type the vendor's client takes."""
    return web.Response(
        status=status, body=json.dumps(body).encode(), headers={"Content-Type": "application/json", **headers}
    )


def failed(status: int, error: str, msg: str, **more: Any) -> web.Response:
    """Return a failure of the first family."""
    return reply({"success": False, "error": error, "msg": msg, **more}, status)


class VastSimulator:
    """The server. ``market`` is its state, ``faults`` what goes wrong."""

    def __init__(self, now_s: Callable[[], float], **market: Any) -> None:
        self.market = Market(now_s, **market)
        self.faults = Faults()
        self.keeps_limits = False  # True: calls of one kind that come too soon get 429
        self.auth_style = "404"  # what a bad key is answered with: 404 or 401, both have been seen
        self._last_s: dict[str, float] = {}
        self.server = TestServer(self._app())

    async def start(self) -> str:
        """Listen and return the base URL."""
        await self.server.start_server()
        return str(self.server.make_url("")).rstrip("/")

    async def close(self) -> None:
        """Stop listening."""
        await self.server.close()

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        for method, path, handler, name in (
            ("POST", "/api/v0/bundles/", self.search, "search"),
            ("PUT", "/api/v0/search/asks/", self.search_asks, "search"),
            ("PUT", "/api/v0/asks/{id:[0-9]+}/", self.create, "create"),
            ("POST", "/api/v0/asks/bulk/", self.create_bulk, "create"),
            ("PUT", "/api/v0/launch_instance/", self.launch, "create"),
            ("GET", "/api/v1/instances/", self.list, "list"),
            ("GET", "/api/v0/instances/", self.list_v0, "list_v0"),
            ("GET", "/api/v0/instances/filters/", self.filters, "filters"),
            ("GET", "/api/v0/instances/{id:[0-9]+}/", self.show, "show"),
            ("PUT", "/api/v0/instances/{id:[0-9]+}/", self.change, "change"),
            ("PUT", "/api/v0/instances/", self.change_bulk, "change"),
            ("DELETE", "/api/v0/instances/{id:[0-9]+}/", self.destroy, "destroy"),
            ("DELETE", "/api/v0/instances/", self.destroy_bulk, "destroy"),
            ("PUT", "/api/v0/instances/reboot/{id:[0-9]+}/", self.reboot, "change"),
            ("PUT", "/api/v0/instances/recycle/{id:[0-9]+}/", self.reboot, "change"),
            ("PUT", "/api/v0/instances/bid_price/{id:[0-9]+}/", self.bid, "bid"),
            ("PUT", "/api/v0/instances/request_logs/{id:[0-9]+}/", self.logs, "logs"),
            ("GET", "/logs/{id:[0-9]+}-{tail:[0-9]+}.log", self.log_file, "log_file"),
            ("GET", "/api/v0/users/current/", self.user, "user"),
            ("GET", "/api/v0/charges/", self.charges, "charges"),
            ("GET", "/api/v0/gpu_names/unique/", self.gpu_names, "gpu_names"),
            ("GET", "/api/v0/gpu_types/", self.gpu_types, "gpu_types"),
            ("GET", "/api/v0/ssh/", self.ssh, "ssh"),
            ("POST", "/api/v0/ssh/", self.ssh, "ssh"),
            ("POST", "/api/v0/instances/{id:[0-9]+}/ssh/", self.ssh, "ssh"),
        ):
            for spelling in {path, path.rstrip("/")}:  # clients leave the last slash out here and there
                app.router.add_route(method, spelling, self._named(name, handler))
        return app

    def _named(self, name: str, handler: Handler) -> Handler:
        async def run(request: web.Request) -> web.StreamResponse:
            await self._note(name, request)
            refused = self._refuse(name, request)
            if refused is not None:
                return refused
            kind = self.faults.take(name)
            if kind is None:
                return await handler(request)
            return self._fault(kind) or await self._wrong(kind, name, request, handler)

        return run

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self.market.settle()
            return await handler(request)
        except web.HTTPNotFound:
            return html(404)
        except json.JSONDecodeError:
            return reply({"error": "invalid_request", "msg": "Invalid json body"}, 400)

    async def _note(self, name: str, request: web.Request) -> None:
        text = await request.text()
        body = json.loads(text) if text else None
        headers = {field.lower(): value for field, value in request.headers.items()}
        self.faults.asked.append(Asked(name, request.method, request.path, dict(request.query), headers, body))

    def _refuse(self, name: str, request: web.Request) -> web.Response | None:
        """Return the refusal of a wrong credential or of a call that comes too soon."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.query.get("api_key")
        if name not in OPEN and not given:
            return failed(403, "auth_error", "This action requires login.")
        if name not in OPEN and given != KEY:
            return failed(int(self.auth_style), "auth_error", "Invalid user key")
        now_s, least_s = self.market.now_s(), THRESHOLDS_S.get(name, 0.0)
        if self.keeps_limits and now_s - self._last_s.get(name, 0.0) < least_s:
            return self._fault("429_text", least_s)
        self._last_s[name] = now_s
        return None

    def _fault(self, kind: str, threshold: float = 4.5) -> web.Response | None:
        """Return the answer of a fault that stands in place of the work."""
        text = f"API requests too frequent: endpoint threshold={threshold}"
        midnight = (int(self.market.now_s()) // 86_400 + 1) * 86_400
        quota = {"success": False, "error": "search_quota_exceeded", "msg": "Daily search quota exceeded."}
        answers: dict[str, Callable[[], web.Response]] = {
            "429_text": lambda: web.Response(status=429, text=text),
            "429_json": lambda: failed(429, "rate_limit_exceeded", "Too many requests"),
            "429_detail": lambda: reply({"detail": text}, 429),
            "429_retry_after": lambda: web.Response(status=429, text=text, headers={"Retry-After": "12"}),
            "quota": lambda: reply(quota, 429, **{"X-RateLimit-Reset": str(midnight)}),
            "auth_401": lambda: failed(401, "auth_error", "Invalid user key"),
            "auth_403": lambda: failed(403, "auth_error", "This action requires login."),
            "auth_404": lambda: failed(404, "auth_error", "Invalid user key"),
            "scope_403": lambda: reply({"success": False, "msg": "Missing permission instance_write"}, 403),
            "no_credit": lambda: failed(400, "insufficient_credit", "Your account lacks credit; see the billing page."),
            "invalid_args": lambda: failed(400, "invalid_args", "error 400/3471: image is not valid"),
            "no_success": lambda: failed(200, "failed", "Something did not work."),
            "gone_410": lambda: failed(410, "no_such_ask", "error 410/3907: ask is no longer available."),
            "500_json": lambda: reply({"success": False, "error": "server_error", "msg": "oops"}, 500),
            "deprecated": lambda: failed(410, "deprecated_endpoint", "This endpoint is deprecated."),
        }
        return answers[kind]() if kind in answers else None

    async def _wrong(self, kind: str, name: str, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Do the work wrongly."""
        if kind == "double":
            await handler(request)
            return await handler(request)
        if kind == "lose" and name == "create":
            return reply({"success": True, "new_contract": 99_000_000, "instance_api_key": "d15a"})
        if kind == "lose":
            return reply({"success": True})
        if kind == "empty":
            total = len(self.market.lives)
            return reply({"success": True, "instances": [], "total_instances": total, "next_token": None, "offers": []})
        if kind == "no_row":
            return reply({"success": True})
        if kind == "other_row":
            return reply({"instances": self.market.row(next(iter(self.market.lives.values()))) | {"id": 1}})
        if kind == "bad_row":
            return reply({"instances": {"id": 1, "ports": {"8000/tcp": [{"HostPort": "many"}]}}})
        return await spoil(kind, request, handler)

    async def search(self, request: web.Request) -> web.Response:
        """POST /bundles/."""
        return self._found(await request.json())

    async def search_asks(self, request: web.Request) -> web.Response:
        """PUT /search/asks/: the query is nested."""
        return self._found((await request.json()).get("q", {}))

    def _found(self, query: Any) -> web.Response:
        try:
            found = search(self.market.open_asks(), query)
        except (SearchError, ValueError, TypeError) as error:
            return reply({"error": "invalid_request", "msg": str(error)}, 400)
        if self.faults.take("search_rows", "violate"):  # the live search has been seen to do so
            found = search(self.market.open_asks(), {"limit": 1_000, "type": query.get("type", "on-demand")})
        return reply({"offers": found})

    async def create(self, request: web.Request) -> web.Response:
        """PUT /asks/{id}/."""
        return self._created(int(request.match_info["id"]), await request.json())

    def _created(self, ask_id: int, body: dict[str, Any]) -> web.Response:
        ask = next((row for row in self.market.open_asks() if row["id"] == ask_id), None)
        if ask is None:
            msg = f"error 404/3603: no_such_ask Instance type by id {ask_id} is not available."
            return failed(404, "invalid_args", msg, ask_id=ask_id)
        if complaint := refuse_body(body):
            return complaint
        life = self.market.create(ask, body)
        if life.price is not None and life.price < ask["min_bid"]:
            msg = "error 400/3511: bid is below the minimum; the instance was created in the stopped state"
            return failed(400, "invalid_price", msg, new_contract=life.id)
        return reply({"success": True, "new_contract": life.id, "instance_api_key": f"{life.id:x}ab"})

    async def create_bulk(self, request: web.Request) -> web.Response:
        """POST /asks/bulk/."""
        body = await request.json()
        answers = [json.loads(self._created(int(id), body).body) for id in body.pop("ids")]  # type: ignore[arg-type]
        made = [answer["new_contract"] for answer in answers if answer["success"]]
        return reply({"success": bool(made), "new_contracts": made, "results": answers})

    async def launch(self, request: web.Request) -> web.Response:
        """PUT /launch_instance/: search and create in one."""
        body = await request.json()
        found = search(self.market.open_asks(), body.pop("q"))
        if not found:
            return failed(404, "no_such_ask", "error 404/3603: no_such_ask nothing fits.")
        return self._created(found[0]["id"], body)

    async def list(self, request: web.Request) -> web.Response:
        """GET /api/v1/instances/: keyset pages."""
        query = request.query
        filters, limit = json.loads(query.get("select_filters", "{}")), int(query.get("limit", PAGE_MAX))
        after = read_token(query.get("after_token"))
        if after is None or any(column not in STORED for column in filters) or not 1 <= limit <= PAGE_MAX:
            return failed(400, "invalid_args", "bad after_token, limit or select_filters")
        rows = [self.market.row(life) for life in sorted(self.market.lives.values(), key=lambda life: life.id)]
        rows = [row for row in rows if all(fits(row, *each) for each in filters.items())]
        left = [row for row in rows if row["id"] > after]
        page, labels = left[:limit], [row["label"] for row in rows]
        return reply(
            {
                "success": True,
                "instances_found": len(page),
                "total_instances": len(rows),
                "label_counts": {label or "": labels.count(label) for label in set(labels)},
                "next_token": token(page[-1]["id"]) if len(left) > limit else None,
                "instances": chosen(page, json.loads(query.get("select_cols", '["*"]'))),
            }
        )

    async def list_v0(self, request: web.Request) -> web.Response:
        """Answer as the retired list does since mid-2026."""
        msg = "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead."
        return failed(410, "deprecated_endpoint", msg)

    async def filters(self, request: web.Request) -> web.Response:
        """GET /instances/filters/."""
        return reply({"filters": []})

    async def show(self, request: web.Request) -> web.Response:
        """GET /instances/{id}/: an object under a plural key, null for what does not exist."""
        life = self._life(request)
        return reply({"instances": self.market.row(life) if life else None})

    async def change(self, request: web.Request) -> web.Response:
        """PUT /instances/{id}/: start, stop, label."""
        life, body = self._life(request), await request.json()
        return self._changed(life, body) if life else missing(request)

    def _changed(self, life: Life, body: dict[str, Any]) -> web.Response:
        if "label" in body:
            life.body["label"] = body["label"]
        if body.get("state") == "running" and life.price is not None and life.price < life.ask["min_bid"]:
            return reply({"success": True})  # accepted, and stays as it is: outbid
        if body.get("state") in ("running", "stopped"):
            life.order(body["state"], self.market.now_s())
        return reply({"success": True})

    async def change_bulk(self, request: web.Request) -> web.Response:
        """PUT /instances/."""
        body = await request.json()
        for id in body.get("ids", []):
            if life := self.market.lives.get(int(id)):
                self._changed(life, body)
        return reply({"success": True})

    async def destroy(self, request: web.Request) -> web.Response:
        """DELETE /instances/{id}/."""
        life = self._life(request)
        if life is None:
            return missing(request)
        self.market.destroy(life.id)
        return reply({"success": True, "msg": f"destroying instance {life.id}."})

    async def destroy_bulk(self, request: web.Request) -> web.Response:
        """DELETE /instances/."""
        for id in (await request.json()).get("instance_ids", []):
            if int(id) in self.market.lives:
                self.market.destroy(int(id))
        return reply({"success": True})

    async def reboot(self, request: web.Request) -> web.Response:
        """Reboot or recycle."""
        return reply({"success": True}) if self._life(request) else missing(request)

    async def bid(self, request: web.Request) -> web.Response:
        """PUT /instances/bid_price/{id}/."""
        life, price = self._life(request), (await request.json()).get("price")
        if life is None:
            return missing(request)
        if not isinstance(price, int | float) or not 0.001 <= price <= 32 * life.ask["num_gpus"]:
            return failed(400, "invalid_price", "price is out of range")
        life.price = float(price)
        return reply({"success": True})

    async def logs(self, request: web.Request) -> web.Response:
        """PUT /instances/request_logs/{id}/: the log appears elsewhere, a moment later."""
        life = self._life(request)
        if life is None:
            return missing(request)
        tail = int((await request.json()).get("tail", "1000"))
        return reply({"success": True, "result_url": str(self.server.make_url(f"/logs/{life.id}-{tail}.log"))})

    async def log_file(self, request: web.Request) -> web.Response:
        """Serve a log from what stands for the vendor's object store, which gets no credential."""
        if self.faults.count("log_file") % 2:
            return web.Response(
                status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="application/xml"
            )
        lines = [f"line {number} of {request.match_info['id']}" for number in range(1, 11)]
        return web.Response(text="\n".join(lines[-int(request.match_info["tail"]) :]) + "\n")

    async def user(self, request: web.Request) -> web.Response:
        """GET /users/current/."""
        left = self.market.left()
        return reply(
            {"id": 42, "email": "ops@example.com", "credit": left, "balance": 0, "ssh_key": None, "api_key": None}
        )

    async def charges(self, request: web.Request) -> web.Response:
        """GET /charges/."""
        day = json.loads(request.query.get("select_filters", "{}")).get("day", {})
        if "gte" not in day or "lte" not in day or int(request.query.get("limit", "20")) > 500:
            return failed(400, "invalid_args", "day needs gte and lte; limit is at most 500")
        rows = self.market.charges(float(day["gte"]), float(day["lte"]))
        return reply({"success": True, "results": rows, "count": len(rows), "total": len(rows), "next_token": None})

    async def gpu_names(self, request: web.Request) -> web.Response:
        """GET /gpu_names/unique/."""
        return reply({"gpu_names": sorted({row["gpu_name"] for row in self.market.asks.values()})})

    async def gpu_types(self, request: web.Request) -> web.Response:
        """GET /gpu_types/."""
        found = {row["gpu_name"]: row["gpu_ram"] for row in self.market.asks.values()}
        return reply({"gpu_types": [{"name": name, "vram_mb": ram} for name, ram in sorted(found.items())]})

    async def ssh(self, request: web.Request) -> web.Response:
        """List, add or attach keys."""
        return reply([] if request.method == "GET" else {"success": True})

    def _life(self, request: web.Request) -> Life | None:
        return self.market.lives.get(int(request.match_info["id"]))


def missing(request: web.Request) -> web.Response:
    """Return what is said of an instance that does not exist."""
    id = request.match_info["id"]
    return failed(404, "no_such_instance", f"error 404/3005: no_such_instance Instance by id {id} not found.")


def refuse_body(body: dict[str, Any]) -> web.Response | None:
    """Return the refusal of a create's body, if it has to be."""
    if not isinstance(body.get("image"), str) or not 1 <= len(body["image"]) <= 1_024:
        return failed(400, "invalid_args", "error 400/3471: image is required")
    if not isinstance(body.get("env") or {}, dict):
        return failed(400, "invalid_args", "env must be an object")
    if len(body.get("label") or "") > 256:
        return failed(400, "invalid_args", "label is over 256 characters")
    price = body.get("price")
    if price is not None and not 0.001 <= float(price) <= 128:
        return failed(400, "invalid_price", "price must be between 0.001 and 128")
    if sum(name.startswith("-p ") for name in body.get("env") or {}) > 64:
        return failed(400, "invalid_args", "at most 64 ports")
    return None


def chosen(rows: list[dict[str, Any]], columns: list[str]) -> list[dict[str, Any]]:
    """Return the columns asked for."""
    return rows if "*" in columns else [{name: row.get(name) for name in columns} for row in rows]


def token(id: int) -> str:
    """Return the mark after which the next page begins."""
    return base64.urlsafe_b64encode(json.dumps({"id": id}).encode()).decode()


def read_token(text: str | None) -> int | None:
    """Return the id in a mark, -1 for none, None for one that is none."""
    try:
        return int(json.loads(base64.urlsafe_b64decode(text))["id"]) if text else -1
    except (ValueError, KeyError, TypeError):
        return None
