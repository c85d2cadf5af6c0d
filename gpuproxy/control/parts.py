"""What handlers find in the application: the store, the configuration, the secrets, the open sockets."""

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from gpuproxy.access.attempts import Attempts
from gpuproxy.access.callers import Caller
from gpuproxy.access.keyring import Keyring
from gpuproxy.access.passwords import Hasher
from gpuproxy.config import Config
from gpuproxy.control.nodes import Nodes
from gpuproxy.control.routing import RoutingFeed
from gpuproxy.control.wanting import UsageWanted
from gpuproxy.events.hub import Hub
from gpuproxy.events.stream import Stream
from gpuproxy.fleet.offers import Offers
from gpuproxy.fleet.parts import Fleet
from gpuproxy.ledger.leases import Leases
from gpuproxy.store.bus import Bus
from gpuproxy.store.engine import Store
from gpuproxy.store.leader import Leader

if TYPE_CHECKING:
    from gpuproxy.control.listener import Listener
    from gpuproxy.ledger.ingest import Ingest

STORE = web.AppKey("store", Store)
BUS = web.AppKey("bus", Bus)
NODES = web.AppKey("nodes", Nodes)
LEADER = web.AppKey("leader", Leader)
CONFIG = web.AppKey("config", Config)
ROUTING = web.AppKey("routing", RoutingFeed)
KEYRING = web.AppKey("keyring", Keyring)
HASHER = web.AppKey("hasher", Hasher)
ATTEMPTS = web.AppKey("attempts", Attempts)
FLEET = web.AppKey("fleet", Fleet)
OFFERS = web.AppKey("offers", Offers)
STOPPING = web.AppKey("stopping", asyncio.Event)
LEASES = web.AppKey("leases", Leases)
INGEST: "web.AppKey[Ingest]" = web.AppKey("ingest")  # in the control process
EXPORTING: web.AppKey[set[str]] = web.AppKey("exporting")  # the users whose exports run
HUB = web.AppKey("hub", Hub)
STREAM = web.AppKey("stream", Stream)
USAGE_WANTED = web.AppKey("usage_wanted", UsageWanted)
LISTENERS: "web.AppKey[set[Listener]]" = web.AppKey("listeners")

CALLER = web.RequestKey("caller", Caller)  # set on every route that asks for a credential
