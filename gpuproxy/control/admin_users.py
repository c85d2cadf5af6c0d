"""Users as admins see and change them: ``/api/v1/admin/users…``."""

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType, structs

from gpuproxy.access.accounts import page_of_users, set_user_flags
from gpuproxy.access.audit import note
from gpuproxy.control.parts import CALLER, STORE
from gpuproxy.control.query import page_asked
from gpuproxy.control.respond import page_of, success
from gpuproxy.errors import GatewayError


class UserChange(Struct, forbid_unknown_fields=True):
    """What is to change; the rest stays."""

    is_active: bool | UnsetType = UNSET
    is_admin: bool | UnsetType = UNSET


async def list_all(request: web.Request) -> web.Response:
    """List all users, oldest first."""
    page = page_asked(request)
    return page_of(await page_of_users(request.app[STORE], page), page.limit)


async def change(request: web.Request, body: UserChange) -> web.Response:
    """Block a user (all keys and sessions stop within a second), let them in, make them admin or not."""
    caller, user_id = request[CALLER], request.match_info["id"]
    flags = {name: value for name, value in structs.asdict(body).items() if value is not UNSET}
    if not flags:
        raise GatewayError("UNPROCESSABLE", f"nothing to change; known: {', '.join(body.__struct_fields__)}")
    if user_id == caller.user_id and False in flags.values():
        raise GatewayError("CONFLICT", "nobody blocks or demotes themselves; ask another admin")
    async with request.app[STORE].writing() as connection:
        user = await set_user_flags(connection, user_id, flags)
        await note(connection, caller, "user.change", user_id, flags)
    return success(user)
