"use strict";

// Follow a training run: replace the part of its page that changes whenever the server sends an event, or every few seconds.

const POLL_MS = 3000;

function follow(panel) {
  let isLoading = false;
  let isLate = false;

  async function update() {
    if (isLoading) {
      isLate = true;
      return;
    }
    isLoading = true;
    try {
      const response = await fetch(panel.dataset.status, { headers: { Accept: "text/html" } });
      if (!response.ok) return;
      const next = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("status");
      if (!next) return;
      document.getElementById("status").replaceWith(next);
      if (next.dataset.active === "0") location.reload(); // shows the result and its buttons
    } catch {
      // the server is being restarted: the next event or poll updates the page
    } finally {
      isLoading = false;
      if (isLate) {
        isLate = false;
        update();
      }
    }
  }

  function poll() {
    setInterval(() => {
      if (!document.hidden) update();
    }, POLL_MS);
  }

  if (!("EventSource" in window)) {
    poll();
    return;
  }
  const events = new EventSource(panel.dataset.events);
  events.addEventListener("state", update);
  events.addEventListener("end", () => {
    events.close();
    update();
  });
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) poll(); // the server rejected the connection
  });
}

function estimate(form) {
  const text = document.getElementById("estimate");
  const fields = form.dataset.estimateFields.split(" ");

  async function update() {
    const query = new URLSearchParams(new FormData(form));
    for (const name of [...query.keys()]) {
      if (!fields.includes(name)) query.delete(name);
    }
    try {
      const response = await fetch(`${form.dataset.estimate}?${query}`);
      if (!response.ok) return;
      const { seconds, run } = await response.json();
      text.textContent = run
        ? `About ${duration(seconds)}, estimated from the run ${run}.`
        : "No estimate yet, as no run with this network and kind of last layer has been measured.";
    } catch {
      // the estimate of the page stays
    }
  }

  form.addEventListener("change", update);
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

document.documentElement.classList.add("js");
const panel = document.querySelector("[data-events]");
if (panel) follow(panel);
const form = document.querySelector("[data-estimate]");
if (form) estimate(form);
