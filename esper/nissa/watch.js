// Keeps the page of a run up to date; the server answers 304 while nothing is new.
const INTERVAL_MS = 2000;
let tag = "";

function take(html) {
  const opened = [...document.querySelectorAll("details")].map((details) => details.open);
  const next = new DOMParser().parseFromString(html, "text/html");
  document.title = next.title;
  document.querySelector("style").replaceWith(document.adoptNode(next.querySelector("style")));
  document.body.replaceWith(document.adoptNode(next.body));
  document.querySelectorAll("details").forEach((details, i) => {
    details.open = opened[i] ?? details.open;
  });
}

function say(text) {
  const status = document.getElementById("status");
  if (status) status.textContent = text;
}

function age() {
  const seconds = Math.round(Date.now() / 1000 - document.body.dataset.recorded);
  if (seconds < 5) return "live";
  return seconds < 120 ? `live, ${seconds} s ago` : `no news for ${Math.round(seconds / 60)} min`;
}

async function refresh() {
  try {
    const answer = await fetch("/", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
    if (answer.ok) {
      tag = answer.headers.get("ETag");
      take(await answer.text());
    }
    if (document.body.dataset.state === "final") return;
    if (document.body.dataset.state === "live") say(answer.status >= 500 ? "unreadable" : age());
  } catch {
    say("the server has gone; this is what it last knew");
  }
  setTimeout(refresh, INTERVAL_MS);
}

refresh();
