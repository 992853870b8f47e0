// Listing pages of the gallery: filters in place, missing photos, keys. Loaded before the page is drawn, so that nothing moves.
"use strict";

{
  const root = document.documentElement;
  const OPEN_KEY = "gallery-filters";
  const MISSING = { 404: "Photo missing", 409: "Photo was replaced", 503: "Server busy", 504: "Server busy" };
  let shownUrl = location.pathname + location.search;
  root.classList.add("js");

  // Photos that cannot be loaded

  const showMissing = (image, text) => {
    const box = document.createElement("span");
    box.className = "gone";
    box.textContent = text;
    if (image.alt) box.setAttribute("aria-label", `${image.alt}: ${text}`);
    if (image.alt) box.setAttribute("role", "img");
    image.replaceWith(box);
  };

  const retry = async (image) => {
    const response = await fetch(image.src, { method: "HEAD" }).catch(() => ({ status: 0, headers: new Headers() }));
    if (response.status < 500 || image.dataset.again) return showMissing(image, MISSING[response.status] ?? "Cannot be shown");
    image.dataset.again = "once";
    const seconds = Number(response.headers.get("Retry-After")) || 1;
    setTimeout(() => (image.src = image.src), 1000 * seconds);
  };

  addEventListener("error", (event) => event.target instanceof HTMLImageElement && retry(event.target), true);

  // Filters and order are applied in place: what was used keeps its focus and its position in the window

  const keyOf = (element) => {
    if (element.dataset.filter) return `[data-filter="${CSS.escape(element.dataset.filter)}"]`;
    return element.name ? `[name="${CSS.escape(element.name)}"]:not([type=hidden])` : null;
  };

  async function replacePage(url, used, { isBack = false } = {}) {
    const main = document.getElementById("main");
    main.setAttribute("aria-busy", "true");
    const response = await fetch(url).catch(() => null);
    const other = response?.ok && new DOMParser().parseFromString(await response.text(), "text/html");
    if (!other || !other.querySelector("#main #photos")) return location.assign(url);
    const key = used && keyOf(used);
    const top = used?.getBoundingClientRect().top ?? 0;
    const fresh = showPage(other, response.url, { isBack });
    const same = key && fresh.querySelector(key);
    if (same) scrollBy(0, same.getBoundingClientRect().top - top);
    (same ?? fresh.querySelector("#photos")).focus({ preventScroll: true });
  }

  function showPage(page, url, { isBack = false, isSame = false } = {}) {
    const main = document.getElementById("main");
    const fresh = page.getElementById("main");
    const openDetails = [...main.querySelectorAll("details.more-choices")].map((element) => element.open);
    main.replaceWith(fresh);
    document.title = page.title;
    if (!isBack) history[isSame ? "replaceState" : "pushState"](null, "", url);
    shownUrl = location.pathname + location.search;
    setUp();
    [...fresh.querySelectorAll("details.more-choices")].forEach((element, index) => (element.open = openDetails[index] ?? false));
    dispatchEvent(new Event("gallery-shown"));
    return fresh;
  }

  window.gallery = { showPage };

  addEventListener("click", (event) => {
    const link = event.target.closest("a[data-filter]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    replacePage(link.href, link);
  });

  addEventListener("change", (event) => {
    const form = event.target.closest("form[data-auto-submit]");
    if (form) replacePage(`${form.action}?${new URLSearchParams(new FormData(form))}`, event.target);
  });

  addEventListener("popstate", () => {
    if (location.pathname + location.search !== shownUrl) replacePage(location.href, null, { isBack: true });
  });

  // Keys: left and right turn pages where they have no other use

  const scrolls = (element) => element.closest(".scroll") && element.closest(".scroll").scrollWidth > element.closest(".scroll").clientWidth;

  addEventListener("keydown", (event) => {
    if (event.key === " " && event.target.matches("a.choice[role=checkbox]")) {
      event.preventDefault();
      event.target.click();
    }
    if (event.key === "Escape" && location.hash === "#confusion") location.hash = "photos";
    const direction = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    if (!direction || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea, [contenteditable]") || scrolls(event.target)) return;
    const link = document.querySelector(`a[rel="${direction}"]`);
    if (!link) return;
    event.preventDefault();
    location.assign(link.href);
  });

  function setUp() {
    for (const choice of document.querySelectorAll(".choice[data-filter]")) {
      choice.setAttribute("role", "checkbox");
      choice.setAttribute("aria-checked", String(choice.hasAttribute("aria-current")));
    }

    // On a phone the filters stay open from one choice to the next
    const filters = document.getElementById("filters");
    if (filters) {
      filters.open ||= sessionStorage.getItem(OPEN_KEY) === "1";
      filters.addEventListener("toggle", () => sessionStorage.setItem(OPEN_KEY, filters.open ? "1" : "0"));
    }

    for (const button of document.querySelectorAll("[data-copy]")) {
      button.hidden = !navigator.clipboard; // browsers offer it over HTTPS and on localhost only
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 2000);
      });
    }
  }

  addEventListener("DOMContentLoaded", setUp);

  // Back from a photo's page its review is shown
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
