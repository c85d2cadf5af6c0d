"""How vast.ai searches: operators, numbers that come as text, filters that are no columns, the price of the disk."""

from typing import Any

OPERATORS = {
    "eq": lambda have, want: have == want,
    "neq": lambda have, want: have != want,
    "gt": lambda have, want: have > want,
    "gte": lambda have, want: have >= want,
    "lt": lambda have, want: have < want,
    "lte": lambda have, want: have <= want,
    "in": lambda have, want: have in want,
    "notin": lambda have, want: have not in want,
}
SPELLINGS = {"=": "eq", "==": "eq", "!=": "neq", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "not in": "notin"}
NO_COLUMNS = ("order", "type", "limit", "allocated_storage", "disable_bundling", "select_cols", "q")
MONTH_HOURS = 720


class SearchError(Exception):
    """The query is none."""


def search(rows: list[dict[str, Any]], query: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that fit, priced, in order, no more than asked for."""
    kind = {"interruptible": "bid", "ondemand": "on-demand"}.get(query.get("type", "on-demand"), query.get("type"))
    priced = [price(row, float(query.get("allocated_storage", 5.0)), kind == "bid") for row in rows]
    found = [row for row in priced if all(fits(row, *each) for each in query.items() if each[0] not in NO_COLUMNS)]
    for field, direction in reversed(query.get("order", [["score", "desc"]])):
        found.sort(key=lambda row: row.get(field) or 0, reverse=direction == "desc")
    return found[: int(query.get("limit", 64))]


def price(row: dict[str, Any], storage_gb: float, is_bid: bool) -> dict[str, Any]:
    """Return the row with the price of GPU and disk together."""
    base = row["min_bid"] if is_bid else row["dph_base"]
    disk = storage_gb * row["storage_cost"] / MONTH_HOURS
    parts = {"gpuCostPerHour": base, "diskHour": disk, "totalHour": base + disk}
    return {**row, "dph_base": base, "dph_total": base + disk, "is_bid": is_bid, "search": parts}


def fits(row: dict[str, Any], field: str, conditions: Any) -> bool:
    """Tell whether one field of a row meets its conditions."""
    if not isinstance(conditions, dict):
        raise SearchError(f"{field} is no condition")
    for name, want in conditions.items():
        operator = OPERATORS.get(SPELLINGS.get(name, name))
        if operator is None:
            raise SearchError(f"unknown operator {name}")
        have = value(row, field)
        if have is None or not operator(have, alike(want, have)):
            return False
    return True


def value(row: dict[str, Any], field: str) -> Any:
    """Return what a field means; some are no columns."""
    if field == "verified":
        return row["verification"] == "verified"
    if field == "datacenter":
        return row["hosting_type"] == 1
    if field == "geolocation":
        return row["geolocation"].rpartition(", ")[2]
    return row.get(field)


def alike(want: Any, have: Any) -> Any:
    """Return an operand in the type of the column: clients send numbers as text."""
    if isinstance(want, list):
        return [alike(each, have) for each in want]
    if isinstance(have, bool) and isinstance(want, str):
        return want.lower() == "true"
    if isinstance(have, int | float) and isinstance(want, str):
        return float(want)
    return want
