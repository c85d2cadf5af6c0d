"""Requests per minute over several nodes, counted in Redis by its clock: never more than the limit, whoever asks.

Each grant is one script, so it is one step for all nodes. A lease counts from its grant until a minute after its end,
as in `rates`; its end here is reckoned from before the question, so it is never later than Redis thinks.

A node also counts by itself what it hands out. While Redis is away it goes on with its share, the limit divided by
the nodes seen last: then, and only then, a minute that begins before and ends after the change may see up to a share
more for each other node. When Redis is back the node first tells what it handed out meanwhile. A Redis that has
forgotten everything is noticed by a mark that is gone: all nodes tell it again what they know, and until they had the
time for that each keeps to its share.
"""

import time
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from gpuproxy.ledger.rates import LEASE_NS, MINUTE_NS, SHARE, Entry, LeaseKey
from gpuproxy.ledger.windows import LocalWindows, Part, Subject, Windows
from gpuproxy.store.redis import Redis, RedisAwayError

PREFIX = "gpuproxy:limits"
NODES, BORN = f"{PREFIX}:nodes", f"{PREFIX}:born"
NODE_SEEN_S = 5.0  # a node that was not seen for so long has no share
SETTLE_S = 2.0  # how long nodes have to tell a Redis that has forgotten; they look twice a second
ENTRIES_AT_ONCE = 500
EVERYTHING = 1 << 40  # taken back when nobody knows whether it was ever granted
NS_PER_US = 1_000

# Removes what counts no more and what came back, then grants. Returns amount, left, microseconds until something comes
# back, and after a refusal the leases that may hold something; nothing if this is not the data the node knows.
GRANT = """
local untils, amounts = KEYS[1], KEYS[2]
if redis.call('GET', KEYS[3]) ~= ARGV[1] then return {} end
local member, limit, least, wanted = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local part, lease, minute = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function take_back(name, most)
  local amount = tonumber(redis.call('HGET', amounts, name) or '0')
  local back = math.min(amount, most)
  if back > 0 then redis.call('HINCRBY', amounts, 'total', -back) end
  if back < amount then redis.call('HINCRBY', amounts, name, -back) return end
  redis.call('HDEL', amounts, name)
  redis.call('ZREM', untils, name)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', untils, '-inf', now - minute)) do take_back(name, math.huge) end
for i = 9, #ARGV, 2 do take_back(ARGV[i], tonumber(ARGV[i + 1])) end
local left = math.max(0, limit - tonumber(redis.call('HGET', amounts, 'total') or '0'))
local amount = 0
if left >= least then amount = math.min(left, math.max(least, math.min(wanted, math.floor(left / part)))) end
if amount > 0 then
  redis.call('HSET', amounts, member, amount)
  redis.call('HINCRBY', amounts, 'total', amount)
  redis.call('ZADD', untils, now + lease, member)
  for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], (lease + minute) / 1000 + 1000) end
end
local oldest = redis.call('ZRANGE', untils, 0, 0, 'WITHSCORES')
local answer = {amount, left - amount, oldest[2] and oldest[2] + minute - now or 0}
if amount == 0 then
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', untils, now, '+inf', 'LIMIT', 0, 100)) do
    answer[#answer + 1] = name
  end
end
return answer
"""

# Counts leases as they are: name, amount, microseconds until the end of each.
ADD = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for i = 2, #ARGV, 3 do
  local before = redis.call('HGET', KEYS[2], ARGV[i]) or '0'
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  redis.call('HINCRBY', KEYS[2], 'total', ARGV[i + 1])
  redis.call('HINCRBY', KEYS[2], 'total', tonumber(before) > 0 and '-' .. before or '0')
  redis.call('ZADD', KEYS[1], now + ARGV[i + 2], ARGV[i])
end
for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
"""

# Notes that this node is here; returns how many are, the mark of this data, and its age in microseconds.
MEET = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3])
redis.call('SET', KEYS[2], string.format('%s:%.0f', ARGV[2], now), 'NX')
local born = redis.call('GET', KEYS[2])
return {redis.call('ZCARD', KEYS[1]), born, now - tonumber(string.match(born, ':(%d+)$'))}
"""


class SharedWindows:
    """Counts together with the other nodes on `redis`; `node` is this one's name."""

    def __init__(self, redis: Redis, node: str) -> None:
        self.node_count = 1
        self._redis = redis
        self._node = node
        self._here = LocalWindows()  # what this node handed out, whoever counted it
        self._untold: set[tuple[Subject, LeaseKey]] = set()  # handed out while Redis was away
        self._back: dict[Subject, dict[LeaseKey, int]] = {}
        self._born = ""  # mark of the data that holds all this node knows
        self._is_shared = False
        self._careful_until_s = 0.0
        redis.meet = self.meet

    async def grant(self, subject: Subject, key: LeaseKey, limit: int, least: int, wanted: int, now_ns: int) -> Part:
        """Hand out, by Redis, or while it is away by this node's share."""
        was_asked = False
        if self._is_shared:
            try:
                return await self._grant_shared(subject, key, limit, least, wanted, now_ns)
            except RedisAwayError:
                self._is_shared = False
                was_asked = True
        part = await self._here.grant(subject, key, self._share(limit), least, wanted, now_ns)
        if part.amount:
            self._untold.add((subject, key))
        elif was_asked:
            self._back.setdefault(subject, {})[key] = EVERYTHING
        return part

    def take_back(self, subject: Subject, key: LeaseKey, amount: int) -> None:
        """Count no more; others see it after the next `grant` or `flush`."""
        self._here.take_back(subject, key, amount)
        if amount > 0 and (subject, key) not in self._untold:
            back = self._back.setdefault(subject, {})
            back[key] = back.get(key, 0) + amount

    def holders(self, subject: Subject, now_ns: int) -> set[str]:
        """Return the workers here that may have something unspent."""
        return self._here.holders(subject, now_ns)

    async def flush(self) -> None:
        """Tell Redis what came back; while it is away it will hear later."""
        for subject in list(self._back) if self._is_shared else ():
            try:
                await self._ask(subject, ("", 0), 0, 1, 0)
            except RedisAwayError:
                self._is_shared = False
                return

    def sweep(self, now_ns: int) -> None:
        """Forget what counts no more."""
        self._here.sweep(now_ns)
        self._untold = {each for each in self._untold if each[0] in self._here.windows}
        if not self._is_shared:  # what came back counts for a minute at most
            self._back = {subject: back for subject, back in self._back.items() if subject in self._here.windows}

    async def meet(self) -> None:
        """Note that this node is here and tell what Redis does not know. Raises RedisAwayError."""
        words = (self._node, uuid4().hex, int(NODE_SEEN_S * 1_000_000))
        count, mark, age_us = await self._redis.ask(MEET, (NODES, BORN), words)
        born = mark.decode()
        if born != self._born:
            self._is_shared = False
            self._back.clear()  # what is told now is without it
            self._untold |= {(subject, key) for subject, w in self._here.windows.items() for key in w.entries}
            if self._born and age_us < SETTLE_S * 1_000_000:
                self._careful_until_s = time.monotonic() + SETTLE_S
        if time.monotonic() >= self._careful_until_s:
            self.node_count = count
        self.node_count = max(self.node_count, count)
        while self._untold:
            await self._tell(self._untold)
        self._born, self._is_shared = born, True

    def _share(self, limit: int) -> int:
        return max(1, limit // self.node_count)

    async def _grant_shared(
        self, subject: Subject, key: LeaseKey, limit: int, least: int, wanted: int, now_ns: int
    ) -> Part:
        counted = self._share(limit) if time.monotonic() < self._careful_until_s else limit
        amount, left, reset_us, *holders = await self._ask(subject, key, counted, least, wanted)
        until_ns = now_ns + LEASE_NS
        if amount:
            self._here.note(subject, key, Entry(amount, until_ns))
        elsewhere = {name.decode().partition("/")[0] for name in holders} - {self._node}
        return Part(amount, until_ns, left, now_ns + reset_us * NS_PER_US, elsewhere)

    async def _ask(self, subject: Subject, key: LeaseKey, limit: int, least: int, wanted: int) -> Any:
        """Run the script. What came back goes with it once: said twice it would count twice, so after a failure
        it counts on until its minute is over.
        """
        back = [word for each in self._back.pop(subject, {}).items() for word in (self._member(each[0]), each[1])]
        words = (self._born, self._member(key), limit, least, wanted, SHARE, LEASE_NS // NS_PER_US)
        answer = await self._redis.evaluate(GRANT, (*_keys(subject), BORN), (*words, MINUTE_NS // NS_PER_US, *back))
        if not answer:
            raise RedisAwayError("it has forgotten everything")
        return answer

    async def _tell(self, untold: Iterable[tuple[Subject, LeaseKey]]) -> None:
        """Add leases of one subject to what Redis counts."""
        chosen = next(iter(untold))[0]
        keys = [key for subject, key in untold if subject == chosen][:ENTRIES_AT_ONCE]
        window = self._here.windows.get(chosen)
        now_ns = time.monotonic_ns()
        words: list[str | int] = [(LEASE_NS + MINUTE_NS) // 1_000_000 + 1_000]
        for key in keys:
            entry = window.entries.get(key) if window is not None else None
            if entry is not None and entry.amount:
                words += [self._member(key), entry.amount, (entry.until_ns - now_ns) // NS_PER_US]
        await self._redis.ask(ADD, _keys(chosen), words)
        self._untold -= {(chosen, key) for key in keys}

    def _member(self, key: LeaseKey) -> str:
        return f"{self._node}/{key[0]}/{key[1]}"


def _keys(subject: Subject) -> tuple[str, str]:
    name = f"{PREFIX}:{'/'.join(subject)}"
    return f"{name}:untils", f"{name}:amounts"


_: type[Windows] = SharedWindows
