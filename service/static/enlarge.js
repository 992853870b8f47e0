// Rest the mouse on a photo of the grid, or hold a finger on it, to see it larger. The large photo takes no clicks.
"use strict";

{
  const HOVER_MS = 600;
  const HOLD_MS = 450;
  const MAX_MOVE_PX = 10;
  let timer = 0;
  let shown = null;
  let start = [0, 0];

  function hide() {
    clearTimeout(timer);
    shown?.remove();
    shown = null;
  }

  function show(thumbnail) {
    hide();
    shown = document.createElement("div");
    shown.className = "enlarged";
    const image = new Image();
    image.alt = "";
    image.src = thumbnail.src.replace("/thumbnail.jpg", "/original.jpg");
    shown.append(image);
    const box = thumbnail.getBoundingClientRect();
    shown.classList.toggle("at-left", box.left + box.width / 2 > innerWidth / 2); // next to the photo, not over it
    document.body.append(shown);
  }

  const thumbnailAt = (target) => target.closest?.(".tile-link")?.querySelector(".frame img");

  addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse" || event.buttons) return;
    const thumbnail = thumbnailAt(event.target);
    hide();
    if (thumbnail) timer = setTimeout(() => show(thumbnail), HOVER_MS);
  });

  addEventListener("pointerdown", (event) => {
    hide();
    const thumbnail = event.pointerType === "touch" && thumbnailAt(event.target);
    start = [event.clientX, event.clientY];
    if (thumbnail) timer = setTimeout(() => show(thumbnail), HOLD_MS);
  });

  addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch" && Math.hypot(event.clientX - start[0], event.clientY - start[1]) > MAX_MOVE_PX) hide();
  });

  // The finger that held a photo opens neither a menu nor the photo
  addEventListener("contextmenu", (event) => shown && event.preventDefault());
  addEventListener("pointerup", (event) => {
    const wasHeld = shown && event.pointerType === "touch";
    hide();
    if (!wasHeld) return;
    const swallow = (clicked) => (clicked.preventDefault(), clicked.stopPropagation());
    addEventListener("click", swallow, true);
    setTimeout(() => removeEventListener("click", swallow, true), 50);
  });

  for (const name of ["pointercancel", "scroll", "blur", "gallery-shown"]) addEventListener(name, hide);
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("pointerleave", hide);
}
