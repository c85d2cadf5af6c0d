"""A person with a browser and the gateway as it is served: sign in, make a key, see a call of it arrive."""

import json
from pathlib import Path

import httpx
import pytest
from browser import Tab, find_browser, tab
from served import served, store_url
from sqlalchemy import select

from gpuproxy.access.accounts import create_user
from gpuproxy.access.logins import set_password
from gpuproxy.ledger.book import credit
from gpuproxy.store.engine import open_store
from gpuproxy.store.migrate import upgrade
from gpuproxy.store.schema import users

BROWSER = find_browser()
SOCKETS = "sockets = []; WebSocket = class extends WebSocket { constructor(url) { super(url); sockets.push(this); } };"
EMAIL, PASSWORD = "ann@example.com", "correct horse battery"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")


async def open_account(url: str) -> None:
    store = open_store(url)
    await upgrade(store)
    user = await create_user(store, EMAIL)
    await set_password(store, EMAIL, PASSWORD)
    await credit(store, user.id, 10 * 10**9, "gift")
    await store.close()


async def send(page: Tab, form: str, **fields: str) -> None:
    """Fill a form's fields and send it by its button, as a person does."""
    for name, value in fields.items():
        await page.run(f"document.querySelector('{form} [name={name}]').value = {json.dumps(value)}")
    await page.run(f"document.querySelector('{form} button').click()")


async def test_a_person_signs_in_makes_a_key_and_sees_its_call_arrive(tmp_path: Path) -> None:
    assert BROWSER is not None
    await open_account(store_url(tmp_path))
    with served(tmp_path) as gateway:
        async with tab(BROWSER, tmp_path / "profile") as page:
            await page.command("Page.addScriptToEvaluateOnNewDocument", source=SOCKETS)
            await _signed_in(page, gateway.url)
            key = await _made_key(page, gateway.url)
            await _seen(page, gateway.url, key)
            await _caught_up(page, tmp_path)
            await send(page, ".who form")
            await page.until("location.pathname === '/dashboard/sign-in' && document.readyState === 'complete'")
            assert page.problems == []


async def _signed_in(page: Tab, url: str) -> None:
    await page.go(f"{url}/")
    await page.run("document.querySelector('a.primary').click()")
    await page.until("location.pathname === '/dashboard/sign-in' && document.readyState === 'complete'")
    await send(page, "main form", email=EMAIL, password=PASSWORD)
    await page.until("location.pathname === '/dashboard' && document.readyState === 'complete'")
    assert "$10.00" in await page.run("document.querySelector('#tiles').innerText")
    assert await page.run("document.cookie") == ""  # no script can read it


async def _made_key(page: Tab, url: str) -> str:
    await page.go(f"{url}/dashboard/keys")
    await send(page, "main form.card", name="<img src=x onerror=alert(1)>")
    key = str(await page.until("document.querySelector('#made-key') && document.querySelector('#made-key').value"))
    await page.until("document.querySelector('.copy button') !== null")
    assert await page.run("document.images.length") == 0
    return key


async def _caught_up(page: Tab, tmp_path: Path) -> None:
    """What happened while the page was not connected shows when it is again."""
    await page.run("sockets[0].close()")
    await page.until("sockets[0].readyState === WebSocket.CLOSED")
    store = open_store(store_url(tmp_path))
    async with store.reading() as connection:
        user_id = await connection.scalar(select(users.c.id).where(users.c.email == EMAIL))
    await credit(store, user_id, 1_000 * 10**9, "more")
    await store.close()
    await page.until("document.querySelector('#tiles').innerText.includes('$1,0')")
    assert await page.run("[window.isSame, sockets.length]") == [True, 2]


async def _seen(page: Tab, url: str, key: str) -> None:
    """A call made elsewhere shows on the open overview, without reloading."""
    await page.go(f"{url}/dashboard")
    await page.run("window.isSame = true")
    body = {"model": "demo-chat", "messages": [{"role": "user", "content": "What is 17 * 23?"}]}
    async with httpx.AsyncClient(headers={"X-API-Key": key}) as client:
        assert (await client.post(f"{url}/v1/chat/completions", json=body)).status_code == 200
        offers = (await client.get(f"{url}/api/v1/gpu/instances?spot=false")).json()["data"]
        rent = f"{url}/api/v1/gpu/instances/simulated/{offers[0]['id']}"
        assert (await client.post(rent, json={"image": "x"})).status_code == 201
    await page.until("document.querySelector('#calls').innerText.includes('demo-chat')")
    assert await page.run("window.isSame") is True
