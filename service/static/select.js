// Select photos of the grid with the mouse, by keyboard or by drawing a box, and review them in place. Without this script the
// checkboxes, the links and the buttons work as a form.
"use strict";

{
  const MIN_DRAG_PX = 8; // a shorter movement is a click
  const EDGE_PX = 48; // near the edge of the window a box scrolls the page
  const form = () => document.getElementById("batch");
  const status = () => document.getElementById("batch-status");
  const boxes = () => [...document.querySelectorAll(".tile-select input")];
  const boxOf = (tile) => tile.querySelector(".tile-select input");
  const hasShortcuts = () => localStorage.getItem("shortcuts") !== "off";
  let anchor = null; // where a range starts
  let isBusy = false;

  const count = () => boxes().filter((box) => box.checked).length;
  const plural = (number, noun) => `${number.toLocaleString("en-US")} ${noun}${number === 1 ? "" : "s"}`;

  function update({ message = null } = {}) {
    if (!form()) return;
    const all = Number(form().all.value || 0);
    const selected = all || count();
    for (const button of form().querySelectorAll(".batch-actions button, .batch-class select")) button.disabled = !selected;
    const similar = form().querySelector("[data-similar]");
    const only = !all && selected === 1 && boxes().find((box) => box.checked);
    if (similar && only) similar.href = `${similar.dataset.similar}&similar=${only.value.split(":")[1]}`;
    else similar?.removeAttribute("href");
    status().textContent = message ?? (all ? `All ${plural(all, "photo")} selected.` : selected ? `${plural(selected, "photo")} selected.` : "Nothing selected.");
  }

  function selectTiles(tiles, isSelected) {
    if (!tiles.length) return;
    form().all.value = "";
    for (const tile of tiles) boxOf(tile).checked = isSelected;
    update();
  }

  function rangeTo(tile) {
    const tiles = [...document.querySelectorAll(".tile")];
    const [from, to] = [tiles.indexOf(anchor), tiles.indexOf(tile)].sort((a, b) => a - b);
    return from < 0 ? [tile] : tiles.slice(from, to + 1);
  }

  function setUp() {
    for (const input of document.querySelectorAll("[data-range]")) input.type = "range";
    if (!form()) return;
    for (const box of boxes()) box.disabled = false; // a selection of all pages can be changed now
    anchor = null;
    const text = status().dataset.text;
    const hint = document.querySelector(".batch-actions") ? null : status().textContent;
    update({ message: text || hint });
  }

  // Mouse and links

  addEventListener("click", (event) => {
    const box = event.target.closest?.(".tile-select input");
    if (box) {
      const tile = box.closest(".tile");
      selectTiles(event.shiftKey ? rangeTo(tile) : [tile], box.checked);
      anchor = tile;
      return;
    }
    const link = event.target.closest?.("a[data-select]");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
      event.preventDefault();
      selectTiles([...document.querySelectorAll(".tile")], link.dataset.select !== "none");
      if (link.dataset.select === "all") form().all.value = link.dataset.total;
      update();
    }
    if (event.target.closest?.(".batch-bar button") && event.detail > 1) event.preventDefault(); // a double click is one review
  });

  addEventListener("input", ({ target }) => {
    if (target.matches("[data-range]")) target.parentElement.querySelector("output").textContent = target.value;
  });

  // Keys: x selects, arrows move from checkbox to checkbox, and with Shift they select

  function neighbor(tile, key) {
    const tiles = [...document.querySelectorAll(".tile")];
    const columns = tiles.filter((one) => one.offsetTop === tiles[0].offsetTop).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    return step && tiles[tiles.indexOf(tile) + step];
  }

  addEventListener("keydown", (event) => {
    const tile = event.target.closest?.(".tile");
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && count() && !event.target.closest?.("select, input:not([type=checkbox])")) {
      return selectTiles([...document.querySelectorAll(".tile")], false);
    }
    if (!tile) return;
    const isBox = event.target.matches(".tile-select input");
    if (isBox && event.key === "Enter") return event.preventDefault(); // it would submit the form
    if (event.key.toLowerCase() === "x" && hasShortcuts()) {
      event.preventDefault();
      selectTiles(event.shiftKey ? rangeTo(tile) : [tile], event.shiftKey || !boxOf(tile).checked);
      anchor = tile;
    } else if (event.key.startsWith("Arrow") && (isBox || event.shiftKey)) {
      const next = neighbor(tile, event.key);
      if (!next) return;
      event.preventDefault();
      (isBox ? boxOf(next) : next.querySelector(".tile-link")).focus();
      if (event.shiftKey) {
        anchor ??= tile;
        selectTiles(rangeTo(next), true);
      }
    }
  });

  // A box drawn with the mouse selects the photos that it touches

  const touches = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

  addEventListener("pointerdown", (event) => {
    const grid = event.target.closest?.(".tiles");
    if (!grid || event.pointerType !== "mouse" || event.button !== 0 || event.target.closest(".tile-select")) return;
    const [startX, startY] = [event.pageX, event.pageY];
    let box = null;

    const move = (moved) => {
      if (!box && Math.hypot(moved.pageX - startX, moved.pageY - startY) < MIN_DRAG_PX) return;
      if (!box) {
        box = document.createElement("div");
        box.className = "selection-box";
        document.body.append(box);
        document.documentElement.classList.add("selecting");
      }
      moved.preventDefault();
      if (moved.clientY < EDGE_PX) scrollBy(0, -EDGE_PX / 2);
      if (moved.clientY > innerHeight - EDGE_PX) scrollBy(0, EDGE_PX / 2);
      box.style.left = `${Math.min(startX, moved.pageX)}px`;
      box.style.top = `${Math.min(startY, moved.pageY)}px`;
      box.style.width = `${Math.abs(moved.pageX - startX)}px`;
      box.style.height = `${Math.abs(moved.pageY - startY)}px`;
    };

    const stop = (ended) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", stop);
      removeEventListener("pointercancel", stop);
      document.documentElement.classList.remove("selecting");
      if (!box) return;
      const area = box.getBoundingClientRect();
      box.remove();
      if (ended.type === "pointercancel") return;
      const swallow = (clicked) => (clicked.preventDefault(), clicked.stopPropagation());
      addEventListener("click", swallow, true); // the click that ends the movement, if there is one, follows at once
      setTimeout(() => removeEventListener("click", swallow, true));
      selectTiles([...grid.querySelectorAll(".tile")].filter((tile) => touches(tile.getBoundingClientRect(), area)), true);
    };

    addEventListener("pointermove", move);
    addEventListener("pointerup", stop);
    addEventListener("pointercancel", stop);
  });

  addEventListener("dragstart", (event) => event.target.closest?.(".tiles") && event.preventDefault());

  // Reviews in place. All photos of a filter need an answer to a question first, which is a page of its own.

  async function send(button) {
    if (isBusy) return;
    isBusy = true;
    form().classList.add("busy");
    try {
      const body = new URLSearchParams(new FormData(form(), button));
      const response = await fetch(form().action, { method: "POST", body });
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      if (response.redirected && page.querySelector("#photos")) {
        const url = new URL(response.url);
        for (const name of ["left", "selected"]) url.searchParams.delete(name);
        const top = scrollY;
        gallery.showPage(page, url.href, { isSame: true });
        scrollTo(scrollX, top);
        (document.querySelector("[data-undo]:enabled") ?? status()).focus({ preventScroll: true });
      } else {
        const problem = page.querySelector(".alert, .lead")?.textContent.replace(/\s+/g, " ").trim();
        update({ message: problem ? `Not saved: ${problem}` : "Not saved: the server sent no valid response." });
      }
    } catch {
      update({ message: "Not saved: the server is unreachable. Try again later." });
    } finally {
      isBusy = false;
      form()?.classList.remove("busy");
    }
  }

  addEventListener("submit", (event) => {
    if (event.target !== form() || (form().all.value && !event.submitter?.matches("[data-undo]"))) return;
    event.preventDefault();
    send(event.submitter);
  });

  addEventListener("DOMContentLoaded", setUp);
  addEventListener("gallery-shown", setUp);
}
