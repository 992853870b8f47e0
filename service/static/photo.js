// Reviews in place and by keyboard. The server renders every state of the page, and this script swaps it in, so that the page
// also works without JavaScript.
"use strict";

{
  const root = document.documentElement;
  const POLL_MS = 10_000;
  const ZOOMS = [1, 1.5, 2, 3, 4, 6];
  const byId = (id) => document.getElementById(id);
  const page = () => byId("photo-page");
  const draftKey = () => `note ${page().dataset.sha256}`;
  const stored = (storage, key) => storage.getItem(key);
  const hasShortcuts = () => stored(localStorage, "shortcuts") !== "off";
  let isBusy = false;
  let shownUrl = "";
  let zoom = 1;
  root.classList.add("js");
  root.classList.toggle("no-shortcuts", !hasShortcuts());

  const announce = (text) => {
    byId("announcement").textContent = "";
    requestAnimationFrame(() => (byId("announcement").textContent = text));
  };

  const textOf = (element) => element?.textContent.replace(/\s+/g, " ").trim() ?? "";

  const parse = (html) => new DOMParser().parseFromString(html, "text/html");

  // Setup of a page that the server rendered

  function localizeTimes() {
    for (const time of document.querySelectorAll("time[datetime]:not([title])")) {
      time.title = time.textContent;
      time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
    }
  }

  function setUp() {
    localizeTimes();
    const note = byId("note");
    if (note && !note.value) note.value = stored(sessionStorage, draftKey()) ?? "";
    const advance = document.querySelector("input[name=advance]");
    if (advance && stored(sessionStorage, "advance")) advance.checked = stored(sessionStorage, "advance") === "1";
    if (byId("shortcuts")) byId("shortcuts").checked = hasShortcuts();
    const { prefetch, prefetchCrop } = page().dataset;
    for (const url of [prefetch, prefetchCrop]) if (url) new Image().src = url;
    const here = new URL(location.href);
    if (here.searchParams.has("saved")) {
      here.searchParams.delete("saved"); // a reload does not repeat the message
      history.replaceState(null, "", here);
    }
    shownUrl = location.pathname + location.search;
    setZoom(1);
    setOpacity();
    const heatmap = stored(sessionStorage, "heatmap");
    const link = heatmap && !byId("explain").dataset.explained && document.querySelector(`a[data-explain="${heatmap}"]`);
    if (link) explain(link, { isQuiet: true });
  }

  function show(html, url) {
    const other = parse(html);
    const fresh = other.getElementById("photo-page");
    if (!fresh && url) return location.assign(url); // it is saved; only the next page failed
    if (!fresh) return showError(textOf(other.querySelector(".alert")) || "Not saved: the server sent no valid response.");
    const isSame = fresh.dataset.sha256 === page().dataset.sha256;
    if (url) history[isSame ? "replaceState" : "pushState"](null, "", url);
    document.title = other.title;
    page().replaceWith(fresh);
    byId("help").replaceWith(other.getElementById("help"));
    setUp();
    const refused = byId("refused");
    if (refused) return (byId("overwrite") ?? refused).focus({ preventScroll: true });
    document.querySelector("h1").focus({ preventScroll: true });
    announce([textOf(byId("status")), textOf(document.querySelector("h1")), textOf(byId("state"))].join(" "));
  }

  // Replace what another person's review changes, and keep what is being typed
  async function refresh() {
    const current = page();
    const response = await fetch(current.dataset.page);
    if (!response.ok) return;
    const other = parse(await response.text());
    if (current !== page() || isBusy) return;
    const focusedKey = document.activeElement?.dataset?.key;
    const typed = byId("new-label")?.value;
    const isTyping = document.activeElement === byId("new-label");
    for (const element of document.querySelectorAll("[data-live]")) {
      const fresh = other.getElementById(element.id);
      if (fresh) element.replaceWith(fresh);
    }
    if (typed) byId("new-label").value = typed;
    if (isTyping) byId("new-label")?.focus({ preventScroll: true });
    current.dataset.newest = other.getElementById("photo-page").dataset.newest;
    if (focusedKey) document.querySelector(`[data-key="${focusedKey}"]`)?.focus({ preventScroll: true });
    localizeTimes();
    announce(textOf(document.querySelector("#history li p")));
  }

  async function poll() {
    const current = page();
    if (document.hidden || isBusy || !current) return;
    const response = await fetch(current.dataset.history).catch(() => null);
    if (!response?.ok || current !== page()) return;
    const { history: rows } = await response.json();
    if (String(rows[0]?.id ?? "") !== current.dataset.newest) await refresh().catch(() => {});
  }

  // Reviews

  async function send(form, button) {
    if (isBusy) return;
    isBusy = true;
    root.classList.add("busy");
    const draft = draftKey();
    try {
      const response = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form, button)) });
      const html = await response.text();
      if (response.redirected) sessionStorage.removeItem(draft);
      isBusy = false;
      show(html, response.redirected ? response.url : null);
    } catch {
      isBusy = false;
      showError("Not saved: the server is unreachable. Try again later.");
    } finally {
      root.classList.remove("busy");
    }
  }

  function showError(text) {
    byId("refused")?.remove();
    const box = document.createElement("div");
    Object.assign(box, { id: "refused", className: "alert", role: "alert", tabIndex: -1, textContent: text });
    document.querySelector("#action-bar > .wrap").prepend(box);
    box.focus({ preventScroll: true });
  }

  // The class that a text names: the same, ignoring case, or the only one that begins with it
  function matchClass(text) {
    const names = [...byId("classes").options].map((option) => option.value);
    const lower = text.trim().toLowerCase();
    const starts = names.filter((name) => lower && name.toLowerCase().startsWith(lower));
    return names.find((name) => name === text.trim()) ?? names.find((name) => name.toLowerCase() === lower) ?? (starts.length === 1 ? starts[0] : null);
  }

  function checkClass() {
    const field = byId("new-label");
    const name = matchClass(field.value);
    field.setCustomValidity(name ? "" : "Enter one of the classes.");
    if (name) field.value = name;
    return field.reportValidity();
  }

  // Heat map and zoom

  const setOpacity = () => {
    const heatmap = document.querySelector(".heatmap");
    if (!heatmap) return;
    byId("opacity").value = stored(sessionStorage, "opacity") ?? 70;
    heatmap.style.opacity = byId("opacity").value / 100;
  };

  async function explain(link, { isQuiet = false } = {}) {
    const section = byId("explain");
    section.setAttribute("aria-busy", "true");
    if (!isQuiet) announce("Computing the heat map\u2026");
    const response = await fetch(link.href).catch(() => null);
    const fresh = response?.ok && parse(await response.text()).getElementById("explain");
    if (section !== byId("explain")) return; // another photo is shown by now
    section.removeAttribute("aria-busy");
    if (!fresh) return isQuiet || location.assign(link.href);
    section.replaceWith(fresh);
    setOpacity();
    if (isQuiet) return;
    history.replaceState(null, "", link.href);
    shownUrl = location.pathname + location.search;
    fresh.querySelector("[aria-current]")?.focus({ preventScroll: true });
    announce(`${textOf(fresh.querySelector("figcaption"))}. ${textOf(fresh.querySelector(".hint, .alert"))}`);
  }

  function setZoom(value) {
    const viewport = byId("viewport");
    if (!viewport) return;
    const centerX = (viewport.scrollLeft + viewport.clientWidth / 2) / viewport.scrollWidth;
    const centerY = (viewport.scrollTop + viewport.clientHeight / 2) / viewport.scrollHeight;
    zoom = value;
    viewport.style.setProperty("--zoom", zoom);
    viewport.classList.toggle("zoomed", zoom > 1);
    byId("zoom").textContent = `${Math.round(100 * zoom)}%`;
    viewport.scrollLeft = centerX * viewport.scrollWidth - viewport.clientWidth / 2;
    viewport.scrollTop = centerY * viewport.scrollHeight - viewport.clientHeight / 2;
  }

  function zoomBy(steps) {
    const next = steps > 0 ? ZOOMS.find((one) => one > zoom) : ZOOMS.findLast((one) => one < zoom);
    if (next) setZoom(next);
  }

  addEventListener("pointerdown", (event) => {
    const viewport = event.target.closest?.(".viewport.zoomed");
    if (!viewport || event.pointerType !== "mouse" || event.button !== 0) return; // touch scrolls natively
    const [x, y, left, top] = [event.clientX, event.clientY, viewport.scrollLeft, viewport.scrollTop];
    const move = (moved) => viewport.scrollTo(left + x - moved.clientX, top + y - moved.clientY);
    viewport.setPointerCapture(event.pointerId);
    viewport.addEventListener("pointermove", move);
    viewport.addEventListener("lostpointercapture", () => viewport.removeEventListener("pointermove", move), { once: true });
  });

  // Two fingers zoom. One finger scrolls natively.

  let pinch = null; // where it started: the distance of the fingers, and the zoom
  const fingerDistance = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;

  addEventListener("touchstart", (event) => {
    pinch = event.touches.length === 2 && event.target.closest?.(".viewport") ? { distance: fingerDistance(event.touches), zoom } : null;
  });

  addEventListener("touchmove", (event) => {
    if (!pinch || event.touches.length !== 2) return;
    event.preventDefault();
    setZoom(Math.min(ZOOMS.at(-1), Math.max(1, (pinch.zoom * fingerDistance(event.touches)) / pinch.distance)));
  }, { passive: false });

  addEventListener("touchend", () => (pinch = null));

  // Events

  addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "post" || !form.action.endsWith("/gallery/review")) return;
    event.preventDefault();
    send(form, event.submitter);
  });

  addEventListener("click", (event) => {
    const target = event.target.closest?.("a, button");
    if (!target) return;
    if (target.closest(".actions") && event.detail > 1) event.preventDefault(); // a double click is one review
    else if (target.value === "label" && target.name === "decision" && !checkClass()) event.preventDefault();
    else if (target.dataset.zoom) zoomBy(Number(target.dataset.zoom));
    else if (target.id === "help-open") byId("help").showModal();
    else if (target.dataset.explain && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
      event.preventDefault();
      sessionStorage.setItem("heatmap", target.dataset.explain);
      explain(target);
    }
  });

  addEventListener("input", ({ target }) => {
    if (target.id === "note") sessionStorage.setItem(draftKey(), target.value);
    if (target.name === "advance") sessionStorage.setItem("advance", target.checked ? "1" : "0");
    if (target.id === "new-label") target.setCustomValidity("");
    if (target.id === "opacity") {
      sessionStorage.setItem("opacity", target.value);
      setOpacity();
    }
    if (target.id === "shortcuts") {
      localStorage.setItem("shortcuts", target.checked ? "on" : "off");
      root.classList.toggle("no-shortcuts", !target.checked);
    }
  });

  // Keys

  const follow = (rel) => document.querySelector(`a[rel="${rel}"]`)?.click();
  const arrows = { ArrowRight: () => follow("next"), ArrowLeft: () => follow("prev") };
  const shortcuts = {
    j: () => follow("next"),
    k: () => follow("prev"),
    t: () => byId("note")?.focus(),
    "/": () => byId("new-label")?.focus(),
    "+": () => zoomBy(1),
    "-": () => zoomBy(-1),
    0: () => setZoom(1),
    "?": () => byId("help").showModal(),
  };

  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("help")?.open) return;
    if (event.target.closest?.("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      if (event.key === "Enter" && event.target.id === "new-label") {
        event.preventDefault();
        document.querySelector(".class-search button").click();
      }
      return;
    }
    if (event.key === "Enter" && event.target.type === "checkbox") return event.preventDefault(); // it would press a button
    if (event.target.closest?.(".viewport.zoomed") && event.key.startsWith("Arrow")) return;
    const action = arrows[event.key] ?? (hasShortcuts() && shortcuts[event.key]);
    if (action) {
      event.preventDefault();
      action();
    } else if (hasShortcuts() && !event.repeat && !isBusy) {
      const button = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key);
      const row = document.querySelector(`#help [data-class-key="${CSS.escape(event.key)}"]`);
      if (button) return button.click();
      if (!row || !byId("new-label")) return;
      byId("new-label").value = row.dataset.name;
      document.querySelector(".class-search button").click();
    }
  });

  addEventListener("DOMContentLoaded", () => {
    if (!page()) return;
    setUp();
    (byId("overwrite") ?? byId("refused"))?.focus({ preventScroll: true });
    setInterval(poll, POLL_MS);
    document.addEventListener("visibilitychange", poll);
  });
  addEventListener("popstate", () => location.pathname + location.search !== shownUrl && location.reload());
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
