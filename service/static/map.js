// The map of the photos: one canvas for the points, one for the lasso above it. Points are drawn as pixels of an image, which
// takes the same short time for 25,000 points wherever they are.
"use strict";

{
  const MAX_LASSO_POINTS = 64;
  const HOVER_MS = 120;
  const HOVER_PX = 14;
  const MIN_LASSO_PX = 8;
  const MARGIN_PX = 16;
  const HUES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b5cd6", "#8c6d31"]; // Okabe and Ito, first
  const byId = (id) => document.getElementById(id);
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const photos = new Map(); // what was loaded about points
  const pointers = new Map();
  let data = null;
  let colors = null; // a color for each point, as the bytes of a pixel
  let view = { scale: 1, x: 0, y: 0 }; // screen = map * scale + offset, in CSS pixels
  let mode = "lasso";
  let image = null; // the pixels of the last frame
  let lasso = [];
  let isDrawn = true;
  let hovered = -1;
  let hoverTimer = 0;

  const frame = () => byId("map-points").getBoundingClientRect();
  const ratio = () => Math.min(2, devicePixelRatio || 1);
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Colors

  const colorOf = (index, count) => (count <= HUES.length ? HUES[index] : `hsl(${Math.round((index * 137.5) % 360)} 60% 48%)`);

  function bytesOf(color) {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return new Uint32Array(context.getImageData(0, 0, 1, 1).data.buffer)[0];
  }

  function groups(kind) {
    const named = (names, values) => ({ names: names.map((name, index) => [name || "none", colorOf(index, names.length)]), values });
    const none = (values, names) => {
      const grouped = named(names, values.map((value) => (value < 0 ? names.length : value)));
      if (values.some((value) => value < 0)) grouped.names.push(["No label", variable("--quiet")]);
      return grouped;
    };
    if (kind === "class") return none(data.label, data.classes);
    if (kind === "predicted") return named(data.classes, data.predicted);
    if (kind === "split") return named(data.splits, data.split);
    if (kind === "review") return { names: [["Not reviewed", variable("--bar-quiet")], ["Reviewed", variable("--accent")]], values: data.reviewed };
    if (kind === "outcome") {
      const names = [["Correct", variable("--good")], ["Incorrect", variable("--bad")], ["No label", variable("--quiet")]];
      return { names, values: data.label.map((label, index) => (label < 0 ? 2 : label === data.predicted[index] ? 0 : 1)) };
    }
    const limits = [60, 80, 95, 99, 101];
    const names = ["below 60%", "60 to 79%", "80 to 94%", "95 to 98%", "99% or more"];
    return { names: names.map((name, index) => [name, `hsl(${10 + 40 * index} 65% 45%)`]), values: data.percent.map((percent) => limits.findIndex((limit) => percent < limit)) };
  }

  function paint() {
    const { names, values } = groups(byId("map-color").value);
    const bytes = names.map(([, color]) => bytesOf(color));
    const counts = new Array(names.length).fill(0);
    colors = Uint32Array.from(values, (value) => (counts[value]++, bytes[value]));
    byId("map-legend").replaceChildren(
      ...names.map(([name, color], index) => {
        const row = document.createElement("li");
        const swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = color;
        const label = document.createElement("bdi");
        label.textContent = name;
        row.append(swatch, label, ` ${counts[index].toLocaleString("en-US")}`);
        return row;
      }),
    );
    request();
  }

  // Drawing

  function request() {
    if (!isDrawn) return;
    isDrawn = false;
    requestAnimationFrame(draw);
  }

  function draw() {
    isDrawn = true;
    if (!data) return;
    const canvas = byId("map-points");
    const factor = ratio();
    const { width: cssWidth, height: cssHeight } = frame();
    const [width, height] = [Math.round(cssWidth * factor), Math.round(cssHeight * factor)];
    if (!width || !height) return;
    for (const one of [canvas, byId("map-lasso")]) if (one.width !== width || one.height !== height) Object.assign(one, { width, height });
    const context = canvas.getContext("2d");
    if (image?.width !== width || image.height !== height) image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    pixels.fill(0);
    const smallest = data.x.length < 1_000 ? 5 : data.x.length < 5_000 ? 4 : data.x.length < 20_000 ? 3 : 2;
    const size = Math.round(factor * clamp(smallest + Math.log2(view.scale / fitScale()), smallest, 8));
    const half = size >> 1;
    const { x: xs, y: ys } = data;
    let inView = 0;
    for (let index = 0; index < xs.length; index++) {
      const left = Math.round((xs[index] * view.scale + view.x) * factor) - half;
      const top = Math.round((ys[index] * view.scale + view.y) * factor) - half;
      if (left < 0 || top < 0 || left + size > width || top + size > height) continue;
      inView++;
      const color = colors[index];
      for (let row = top * width + left, end = row + size * width; row < end; row += width) {
        for (let pixel = row; pixel < row + size; pixel++) pixels[pixel] = color;
      }
    }
    context.putImageData(image, 0, 0);
    byId("map-count").textContent = inView.toLocaleString("en-US");
    drawLasso();
  }

  function drawLasso() {
    const context = byId("map-lasso").getContext("2d");
    const factor = ratio();
    context.setTransform(factor, 0, 0, factor, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    context.strokeStyle = variable("--accent");
    context.lineWidth = 2;
    if (lasso.length > 1) {
      context.beginPath();
      for (const [x, y] of lasso) context.lineTo(x, y);
      context.closePath();
      context.globalAlpha = 0.15;
      context.fillStyle = variable("--accent");
      context.fill();
      context.globalAlpha = 1;
      context.stroke();
    }
    if (hovered >= 0) {
      context.beginPath();
      context.arc(data.x[hovered] * view.scale + view.x, data.y[hovered] * view.scale + view.y, 7, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  // The view

  const fitScale = () => (Math.min(frame().width, frame().height) - 2 * MARGIN_PX) / data.size;

  function fit() {
    const { width, height } = frame();
    const scale = fitScale();
    view = { scale, x: (width - data.size * scale) / 2, y: (height - data.size * scale) / 2 };
    request();
  }

  function zoomBy(factor, x = frame().width / 2, y = frame().height / 2) {
    const scale = clamp(view.scale * factor, fitScale(), fitScale() * 200);
    const change = scale / view.scale;
    view = { scale, x: x - (x - view.x) * change, y: y - (y - view.y) * change };
    setHovered(-1);
    request();
  }

  function moveBy(x, y) {
    view = { ...view, x: view.x + x, y: view.y + y };
    setHovered(-1);
    request();
  }

  // The photo under the pointer

  function nearest(x, y) {
    let found = -1;
    let shortest = HOVER_PX ** 2;
    for (let index = 0; index < data.x.length; index++) {
      const distance = (data.x[index] * view.scale + view.x - x) ** 2 + (data.y[index] * view.scale + view.y - y) ** 2;
      if (distance < shortest) [found, shortest] = [index, distance];
    }
    return found;
  }

  async function load(index) {
    const id = data.id[index];
    if (!photos.has(id)) {
      const response = await fetch(`${byId("map").dataset.photo}&id=${id}`).catch(() => null);
      if (!response?.ok) return null;
      photos.set(id, await response.json());
    }
    return photos.get(id);
  }

  function setHovered(index) {
    if (index === hovered) return;
    hovered = index;
    byId("map-card").hidden = true;
    clearTimeout(hoverTimer);
    drawLasso();
    if (index >= 0) hoverTimer = setTimeout(() => showCard(index), HOVER_MS);
  }

  async function showCard(index) {
    const photo = await load(index);
    if (!photo || index !== hovered) return;
    const card = byId("map-card");
    card.querySelector("img").src = photo.thumbnail;
    byId("map-name").textContent = photo.photo.split("/").pop();
    byId("map-classes").textContent = `${photo.label ?? "unlabeled"}, predicted ${photo.predicted} (${Math.floor(100 * photo.confidence)}%)`;
    card.hidden = false;
    const { width, height } = frame();
    const [x, y] = [data.x[index] * view.scale + view.x, data.y[index] * view.scale + view.y];
    card.style.left = `${clamp(x + 14, 0, width - card.offsetWidth)}px`;
    card.style.top = `${clamp(y + card.offsetHeight + 14 > height ? y - card.offsetHeight - 14 : y + 14, 0, height)}px`;
  }

  // Selection

  const toMap = ([x, y]) => [x, y].map((value, axis) => clamp(Math.round((value - (axis ? view.y : view.x)) / view.scale), 0, data.size));

  function openRegion(outline) {
    const step = Math.max(1, Math.ceil(outline.length / MAX_LASSO_POINTS));
    const points = outline.filter((_, index) => index % step === 0).map((point) => toMap(point).join(","));
    const { grid, map } = byId("map").dataset;
    location.assign(`${grid}&region=${[map, ...points].join(":")}&select=all`);
  }

  function openView() {
    const { width, height } = frame();
    openRegion([[0, 0], [width, 0], [width, height], [0, height]]);
  }

  // Events

  const position = (event) => [event.clientX - frame().left, event.clientY - frame().top];

  function onDown(event) {
    if (event.button !== 0 || !data) return;
    event.target.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, position(event));
    lasso = mode === "lasso" && pointers.size === 1 ? [position(event)] : [];
    setHovered(-1);
  }

  function onMove(event) {
    if (!data) return;
    const [x, y] = position(event);
    const before = pointers.get(event.pointerId);
    if (!before) return setHovered(event.pointerType === "mouse" ? nearest(x, y) : -1);
    if (pointers.size === 2) {
      const [, other] = [...pointers].find(([id]) => id !== event.pointerId);
      const length = ([px, py]) => Math.hypot(px - other[0], py - other[1]) || 1;
      pointers.set(event.pointerId, [x, y]);
      moveBy((x - before[0]) / 2, (y - before[1]) / 2);
      return zoomBy(length([x, y]) / length(before), (x + other[0]) / 2, (y + other[1]) / 2);
    }
    pointers.set(event.pointerId, [x, y]);
    if (mode === "move") return moveBy(x - before[0], y - before[1]);
    lasso.push([x, y]);
    drawLasso();
  }

  async function onUp(event) {
    if (!pointers.delete(event.pointerId) || !data) return;
    const outline = lasso;
    lasso = [];
    drawLasso();
    if (event.type === "pointercancel" || pointers.size) return;
    const [xs, ys] = [outline.map(([x]) => x), outline.map(([, y]) => y)];
    const extent = Math.max(Math.max(...xs) - Math.min(...xs), Math.max(...ys) - Math.min(...ys));
    if (outline.length > 2 && extent >= MIN_LASSO_PX) return openRegion(outline);
    const index = mode === "lasso" ? nearest(...position(event)) : -1;
    const photo = index >= 0 && (await load(index));
    if (photo) location.assign(photo.page);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !data) return;
    const step = 40;
    const actions = {
      ArrowLeft: () => moveBy(step, 0),
      ArrowRight: () => moveBy(-step, 0),
      ArrowUp: () => moveBy(0, step),
      ArrowDown: () => moveBy(0, -step),
      "+": () => zoomBy(1.5),
      "=": () => zoomBy(1.5),
      "-": () => zoomBy(1 / 1.5),
      0: fit,
      Enter: openView,
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  function listen() {
    const canvas = byId("map-points");
    canvas.addEventListener("pointerdown", onDown);
    canvas.addEventListener("pointermove", onMove);
    canvas.addEventListener("pointerup", onUp);
    canvas.addEventListener("pointercancel", onUp);
    canvas.addEventListener("pointerleave", () => setHovered(-1));
    canvas.addEventListener("keydown", onKey);
    canvas.addEventListener("wheel", (event) => {
      if (!data) return;
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY / 400), ...position(event));
    }, { passive: false });
    byId("map-color").addEventListener("change", paint);
    byId("map-view").addEventListener("click", openView);
    for (const button of document.querySelectorAll("[data-mode]")) {
      button.addEventListener("click", () => {
        mode = button.dataset.mode;
        for (const one of document.querySelectorAll("[data-mode]")) one.setAttribute("aria-pressed", String(one === button));
      });
    }
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => (Number(button.dataset.zoom) ? zoomBy(Number(button.dataset.zoom)) : fit()));
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && paint());
    new ResizeObserver(() => data && fit()).observe(byId("map-frame"));
  }

  addEventListener("DOMContentLoaded", async () => {
    if (!byId("map")) return;
    listen();
    const response = await fetch(byId("map").dataset.points).catch(() => null);
    if (!response?.ok) return (byId("map-message").textContent = "The map could not be loaded. Reload the page.");
    data = await response.json();
    byId("map-message").hidden = true;
    fit();
    paint();
    byId("map").dataset.ready = "1";
  });
}
