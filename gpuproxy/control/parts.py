"""What handlers find in the application: the store, the configuration, the open sockets."""

import asyncio
from weakref import WeakSet

from aiohttp import web

from gpuproxy.store.engine import Store

STORE = web.AppKey("store", Store)
STOPPING = web.AppKey("stopping", asyncio.Event)
SOCKETS: web.AppKey[WeakSet[web.WebSocketResponse]] = web.AppKey("sockets")
