"""The simulated marketplace's machines, prices and other customers: all of it a function of seed and time.

Nothing is remembered, so any moment can be asked about and two runs with one seed see the same market. Prices hold
for a window of five minutes, as a real market's quotes do for a while; other customers come and go every twenty.
"""

import hashlib

from msgspec import Struct

WINDOW_NS = 300_000_000_000
TENANCY_NS = 4 * WINDOW_NS
MACHINE_COUNT = 32
TAKEN = 0.3  # the share of machines that others have rented at any time
NANOUSD_PER_HOUR_MIN = 20_000_000  # two cents: nobody rents a GPU for less

# model, GB of memory, newest CUDA, what one is rented for in nanodollars an hour
MODELS = (
    ("RTX 3060", 12, 12.4, 70_000_000),
    ("RTX 3090", 24, 12.4, 180_000_000),
    ("RTX 4090", 24, 12.8, 380_000_000),
    ("RTX 5090", 32, 13.0, 620_000_000),
    ("L40S", 48, 12.8, 790_000_000),
    ("A100 SXM4", 80, 12.8, 1_150_000_000),
    ("H100 SXM", 80, 13.0, 2_200_000_000),
    ("H200", 141, 13.0, 3_100_000_000),
)
REGIONS = ("California, US", "Texas, US", "Quebec, CA", "Bavaria, DE", "Norway, NO", "Iceland, IS", "Tokyo, JP")
COUNTS = (1, 1, 1, 2, 4, 8)


class Machine(Struct, frozen=True):
    """What one machine is; this never changes."""

    id: str
    gpu_model: str
    gpu_count: int
    vram_gb: int
    cuda: float
    usual_nanousd_per_hour: int
    storage_nanousd_per_gb_hour: int
    region: str
    reliability: float
    disk_gb: int


class Market:
    """The machines of one seed, and what the rest of the world does with them."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self.machines = {machine.id: machine for machine in map(self._machine, range(MACHINE_COUNT))}

    def price_nanousd_per_hour(self, machine: Machine, now_ns: int, is_spot: bool) -> int:
        """Return what all its GPUs cost, 85 to 115 % of the usual; the least bid is 30 to 70 %."""
        moved = self._chance(machine.id, "spot" if is_spot else "price", now_ns // WINDOW_NS)
        percent = 30 + int(moved * 41) if is_spot else 85 + int(moved * 31)
        return max(NANOUSD_PER_HOUR_MIN, machine.usual_nanousd_per_hour * percent // 100)

    def is_taken(self, machine: Machine, now_ns: int) -> bool:
        """Tell whether another customer has it."""
        return self._chance(machine.id, "taken", now_ns // TENANCY_NS) < TAKEN

    def is_lucky(self, what: str, chance: float) -> bool:
        """Tell whether something that happens with this chance happens to `what`."""
        return self._chance(what) < chance

    def _machine(self, number: int) -> Machine:
        model, vram_gb, cuda, usual = MODELS[number % len(MODELS)]
        count = COUNTS[int(self._chance(number, "count") * len(COUNTS))]
        return Machine(
            id=f"m{number:02}",
            gpu_model=model,
            gpu_count=count,
            vram_gb=vram_gb,
            cuda=cuda,
            usual_nanousd_per_hour=count * usual,
            storage_nanousd_per_gb_hour=100_000 + int(self._chance(number, "storage") * 300_000),
            region=REGIONS[int(self._chance(number, "region") * len(REGIONS))],
            reliability=round(0.90 + 0.0999 * self._chance(number, "reliability"), 4),
            disk_gb=count * 250,
        )

    def _chance(self, *words: object) -> float:
        """Return a number from 0 up to 1 that depends on the words alone."""
        text = "/".join(map(str, (self._seed, *words)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)
