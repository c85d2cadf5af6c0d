// What a page gains with script: times of this place, a button to copy, and news without reloading. All works without.
"use strict";

const REFRESH_MS = 3000; // at least so long between two looks at the page: each is a request that counts
const RETRY_MS = 5000;

function localTimes(root) {
  for (const time of root.querySelectorAll("time[data-time]")) {
    const at = new Date(time.dataset.time.replace(" ", "T"));
    if (isNaN(at)) continue;
    time.dateTime = at.toISOString();
    time.title = time.dataset.time.replace("Z", " UTC");
    const part = (number) => String(number).padStart(2, "0");
    time.textContent = `${at.getFullYear()}-${part(at.getMonth() + 1)}-${part(at.getDate())} ${part(at.getHours())}:${part(at.getMinutes())}`;
  }
}

function copyButtons() {
  for (const box of document.querySelectorAll(".copy")) {
    const field = box.querySelector("input");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      field.select();
      try {
        await navigator.clipboard.writeText(field.value);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Press Ctrl-C"; // no clipboard without TLS; the field is selected
      }
    });
    box.append(button);
  }
}

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!answer.ok || answer.redirected) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const newer = fresh.getElementById(part.id);
    const isUsed = part.contains(document.activeElement) || part.querySelector("details[open]");
    if (newer && !isUsed && newer.innerHTML !== part.dataset.was) {
      const was = newer.innerHTML;
      localTimes(newer);
      part.replaceWith(newer);
      newer.dataset.was = was;
    }
  }
}

function listen(channels, isAgain = false) {
  let waiting = null;
  let last = 0;
  const soon = () => {
    if (waiting !== null || document.hidden) return;
    waiting = setTimeout(async () => {
      waiting = null;
      last = Date.now();
      await refresh().catch(() => {});
    }, Math.max(200, last + REFRESH_MS - Date.now()));
  };
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.onopen = () => socket.send(JSON.stringify({ type: "subscribe", channels }));
  socket.onmessage = (message) => {
    const told = JSON.parse(message.data);
    if (told.id || (isAgain && told.type === "subscribed")) soon(); // who was away may have missed something
  };
  socket.onclose = (closed) => { if (closed.code !== 1008) setTimeout(() => listen(channels, true), RETRY_MS); };
  document.onvisibilitychange = soon;
}

localTimes(document);
copyButtons();
for (const zone of document.querySelectorAll("[data-zone]")) {
  zone.textContent = Intl.DateTimeFormat().resolvedOptions().timeZone || "of this place";
}
if (document.body.dataset.channels) listen(document.body.dataset.channels.split(" "));
