// Reviewing by keys and in place. The server draws every state of the page; this takes its parts over, so that there is one
// way to draw it, and the page works without this file as well.
"use strict";

{
  const root = document.documentElement;
  const POLL_MS = 10_000;
  const find = (id) => document.getElementById(id);
  const page = () => find("photo-page");
  const draft = () => `note ${page().dataset.sha256}`;
  let isBusy = false;
  let shown = "";
  root.classList.add("js");

  const say = (text) => {
    find("said").textContent = "";
    requestAnimationFrame(() => (find("said").textContent = text));
  };

  const words = (element) => element?.textContent.replace(/\s+/g, " ").trim() ?? "";

  const parse = (html) => new DOMParser().parseFromString(html, "text/html");

  // What the server drew, taken over

  function adorn() {
    for (const time of document.querySelectorAll("time[datetime]:not([title])")) {
      time.title = time.textContent;
      time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    }
  }

  function begin() {
    adorn();
    const note = find("note");
    if (note && !note.value) note.value = sessionStorage.getItem(draft()) ?? "";
    const goesOn = document.querySelector("input[name=advance]");
    if (goesOn && sessionStorage.getItem("advance")) goesOn.checked = sessionStorage.getItem("advance") === "1";
    const { prefetch, prefetchCrop } = page().dataset;
    for (const address of [prefetch, prefetchCrop]) if (address) new Image().src = address;
    const here = new URL(location.href);
    if (here.searchParams.has("saved")) {
      here.searchParams.delete("saved"); // what was just saved is old news for whoever comes back
      history.replaceState(null, "", here);
    }
    shown = location.pathname + location.search;
  }

  function show(html, address) {
    const other = parse(html);
    const fresh = other.getElementById("photo-page");
    if (!fresh && address) return location.assign(address); // it is saved; only the page that follows did not come
    if (!fresh) return complain(words(other.querySelector(".alert")) || "The server gave no answer; nothing was saved.");
    const isSame = fresh.dataset.sha256 === page().dataset.sha256;
    if (address) history[isSame ? "replaceState" : "pushState"](null, "", address);
    document.title = other.title;
    page().replaceWith(fresh);
    find("help").replaceWith(other.getElementById("help"));
    scrollTo(0, 0);
    begin();
    const refused = find("refused");
    if (refused) return (find("overrule") ?? refused).focus();
    document.querySelector("h1").focus({ preventScroll: true });
    say([words(find("saved")?.querySelector("p")), words(find("last")), words(document.querySelector("h1")), words(find("state"))].join(" "));
  }

  // The parts that others' decisions change; what somebody types meanwhile stays
  async function refresh() {
    const asked = page();
    const answer = await fetch(asked.dataset.page);
    if (!answer.ok) return;
    const other = parse(await answer.text());
    if (asked !== page() || isBusy) return;
    const focused = document.activeElement?.dataset?.key;
    for (const part of document.querySelectorAll("[data-live]")) {
      const fresh = other.getElementById(part.id);
      if (fresh) part.replaceWith(fresh);
    }
    asked.dataset.newest = other.getElementById("photo-page").dataset.newest;
    if (focused) document.querySelector(`[data-key="${focused}"]`)?.focus();
    adorn();
    say(words(document.querySelector("#history li p")));
  }

  async function poll() {
    const asked = page();
    if (document.hidden || isBusy || !asked) return;
    const answer = await fetch(asked.dataset.history).catch(() => null);
    if (!answer?.ok || asked !== page()) return;
    const { history: rows } = await answer.json();
    if (String(rows[0]?.id ?? "") !== asked.dataset.newest) await refresh().catch(() => {});
  }

  // Decisions

  async function send(form, button) {
    if (isBusy) return;
    isBusy = true;
    form.setAttribute("aria-busy", "true");
    const note = draft();
    try {
      const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form, button)) });
      const html = await answer.text();
      if (answer.redirected) sessionStorage.removeItem(note);
      isBusy = false;
      show(html, answer.redirected ? answer.url : null);
    } catch {
      isBusy = false;
      complain("The server could not be reached; nothing was saved. Decide again when it is there.");
    } finally {
      form.removeAttribute("aria-busy");
    }
  }

  function complain(text) {
    find("refused")?.remove();
    const box = document.createElement("div");
    Object.assign(box, { id: "refused", className: "alert", role: "alert", tabIndex: -1, textContent: text });
    document.querySelector(".photo-body").before(box);
    box.focus();
  }

  async function explain(link) {
    const section = find("explain");
    section.setAttribute("aria-busy", "true");
    say("Computing where the model looked\u2026");
    const answer = await fetch(link.href).catch(() => null);
    const fresh = answer?.ok && parse(await answer.text()).getElementById("explain");
    if (!fresh) return location.assign(link.href);
    section.replaceWith(fresh);
    history.replaceState(null, "", link.href);
    shown = location.pathname + location.search;
    fresh.querySelector("[aria-current]")?.focus({ preventScroll: true });
    say(words(fresh.querySelector("figcaption")) + ". " + words(fresh.querySelector(".hint, .alert")));
  }

  addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "post" || !form.action.endsWith("/gallery/review")) return;
    event.preventDefault();
    send(form, event.submitter);
  });

  addEventListener("click", (event) => {
    const link = event.target.closest?.("a[data-explain]");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
      event.preventDefault();
      explain(link);
    }
    if (event.target.closest?.("#help-open")) find("help").showModal();
  });

  addEventListener("input", (event) => {
    if (event.target.id === "note") sessionStorage.setItem(draft(), event.target.value);
    if (event.target.name === "advance") sessionStorage.setItem("advance", event.target.checked ? "1" : "0");
  });

  // Keys

  const step = (rel) => document.querySelector(`a[rel="${rel}"]`)?.click();
  const keys = {
    ArrowRight: () => step("next"),
    j: () => step("next"),
    ArrowLeft: () => step("prev"),
    k: () => step("prev"),
    t: () => find("note")?.focus(),
    "?": () => find("help").showModal(),
  };

  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || find("help")?.open) return;
    if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key in keys) {
      event.preventDefault();
      keys[event.key]();
    } else if (!event.repeat && !isBusy) {
      const button = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key);
      if (button) button.click();
      else if (event.key === "u") document.querySelector("[data-undo] button")?.click();
    }
  });

  addEventListener("DOMContentLoaded", () => {
    if (!page()) return;
    begin();
    (find("overrule") ?? find("refused"))?.focus();
    setInterval(poll, POLL_MS);
    document.addEventListener("visibilitychange", poll);
  });
  addEventListener("popstate", () => location.pathname + location.search !== shown && location.reload());
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
