// What the gallery's listing pages do beyond links and forms. Loaded before the page is drawn, so that nothing jumps.
"use strict";

{
  const root = document.documentElement;
  const OPEN = "gallery-panel";
  const GONE = { 404: "Photo missing", 409: "Photo was replaced", 503: "Too much at once", 504: "Too much at once" };
  root.classList.add("js");

  // Photos that do not come

  const showGone = (image, words) => {
    const tile = document.createElement("span");
    tile.className = "gone";
    tile.textContent = words;
    if (image.alt) tile.setAttribute("aria-label", `${image.alt}: ${words}`);
    if (image.alt) tile.setAttribute("role", "img");
    image.replaceWith(tile);
  };

  const ask = async (image) => {
    const answer = await fetch(image.src, { method: "HEAD" }).catch(() => ({ status: 0, headers: new Headers() }));
    if (answer.status < 500 || image.dataset.again) return showGone(image, GONE[answer.status] ?? "Cannot be shown");
    image.dataset.again = "once";
    const seconds = Number(answer.headers.get("Retry-After")) || 1;
    setTimeout(() => (image.src = image.src), 1000 * seconds);
  };

  addEventListener("error", (event) => event.target instanceof HTMLImageElement && ask(event.target), true);

  // Keys: left and right turn pages, where they do nothing else

  const scrolls = (element) => element.closest(".scroll") && element.closest(".scroll").scrollWidth > element.closest(".scroll").clientWidth;

  addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    if (!direction || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (event.target.closest("input, select, textarea, [contenteditable]") || scrolls(event.target)) return;
    const link = document.querySelector(`a[rel="${direction}"]`);
    if (!link) return;
    event.preventDefault();
    location.assign(link.href);
  });

  addEventListener("DOMContentLoaded", () => {
    // A choice in a form that says so is sent at once

    for (const form of document.querySelectorAll("form[data-at-once]")) {
      form.addEventListener("change", () => form.requestSubmit());
    }

    // On a phone the filters stay unfolded from one choice to the next

    const fold = document.getElementById("panel");
    if (fold) {
      fold.open ||= sessionStorage.getItem(OPEN) === "1";
      fold.addEventListener("toggle", () => sessionStorage.setItem(OPEN, fold.open ? "1" : "0"));
    }

    for (const button of document.querySelectorAll("[data-copy]")) {
      button.hidden = !navigator.clipboard; // which a browser has over https and on localhost only
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 2000);
      });
    }
  });

  // Back from a photo's page, what was decided there is to be seen here
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}
