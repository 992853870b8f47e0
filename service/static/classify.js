// Send photos that were dropped, pasted, chosen or taken to /predict, and show a card for each.

const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const form = byId("classify");
const zone = byId("zone");
const keyField = byId("key");
const forgetKey = byId("forget-key");
const message = byId("message");
const results = byId("results");
const cards = byId("cards");
const status = byId("status");
const viewer = byId("viewer");
const progress = { box: byId("progress"), bar: byId("progress-bar"), text: byId("progress-text") };

const MAX_IMAGES = Number(form.dataset.maxImages);
const MAX_BYTES = Number(form.dataset.maxBytes);
const MAX_BARS = Number(form.dataset.maxBars);
const NEITHER = form.dataset.neither;
const OVERHEAD_BYTES = 1024; // upper bound of what a form adds to each photo
const KEY = "key";
const NO_IMAGE = "No image found. Drop or paste an image file.";
const LINK = "This is a link, not a file. Save the image first, then drop or choose the file.";

const queue = [];
let isBusy = false;
let done = 0;
let total = 0;

root.classList.add("js");

// Text

const decimals = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const percents = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const integers = new Intl.NumberFormat("en");

// The same format as the server's: a probability is never exactly 0 or 1, although it may be rounded to it.
function percent(probability) {
  if (probability < 0.0005) return "<0.1%";
  if (probability >= 0.9995) return ">99.9%";
  return `${percents.format(100 * probability)}%`;
}

function announce(text) {
  status.textContent = "";
  requestAnimationFrame(() => (status.textContent = text));
}

function showMessage(text) {
  message.textContent = text;
  message.hidden = !text;
  if (text) announce(text);
}

// Cards

function slot(element, name) {
  return element.querySelector(`[data-slot="${name}"]`);
}

function setSlot(element, name, text) {
  const target = slot(element, name);
  if (text) target.textContent = text;
  else target.remove();
}

function newCard(photo) {
  const card = byId("card-template").content.firstElementChild.cloneNode(true);
  const name = slot(card, "file");
  name.textContent = name.title = photo.name;
  const notes = slot(card, "notes");
  for (const text of photo.notes ?? []) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = text;
    notes.append(note);
  }
  setPicture(card, photo);
  setSlot(card, "problem", photo.problem);
  setSlot(card, "size", photo.size);
  if (photo.page) for (const link of slot(card, "links").children) link.href = photo.page + link.hash;
  else slot(card, "links").remove();
  if (photo.retry) slot(card, "retry").addEventListener("click", photo.retry);
  else slot(card, "retry").remove();
  fillBars(card, photo);
  return card;
}

function setPicture(card, photo) {
  const picture = slot(card, "crop");
  const figure = picture.closest("figure");
  if (!photo.picture) return figure.remove();
  picture.alt = photo.alt;
  picture.addEventListener("error", () => figure.remove());
  picture.src = photo.picture;
  if (photo.original) {
    slot(card, "enlarge").lastElementChild.textContent = ` ${photo.name}`;
    figure.dataset.original = photo.original;
  } else card.querySelector("figcaption").remove();
}

function fillBars(card, photo) {
  if (!photo.probabilities) {
    for (const name of ["label", "bars", "more"]) slot(card, name).closest(".top-result, .bars, .more").remove();
    return;
  }
  const isAbstained = photo.label === null;
  const shown = isAbstained ? 0 : MAX_BARS;
  setSlot(card, "label", isAbstained ? reason(photo) : photo.label);
  setSlot(card, "confidence", isAbstained ? "" : percent(photo.confidence));
  const bars = Object.entries(photo.probabilities).sort((a, b) => b[1] - a[1]);
  const others = slot(card, "others");
  if (isAbstained) {
    slot(card, "label").classList.add("abstained");
    slot(card, "bars").remove();
    setSlot(card, "summary", "Show probabilities");
    others.setAttribute("aria-label", "Probabilities");
  } else {
    slot(card, "bars").append(...bars.slice(0, shown).map(newBar));
    if (bars.length <= shown) return slot(card, "more").remove();
    setSlot(card, "count", integers.format(bars.length));
  }
  slot(card, "more").addEventListener("toggle", () => others.append(...bars.slice(shown).map(newBar)), { once: true });
}

// Why a photo has no label. The server's page has the sentence for a photo that is unlike the training photos.
function reason(photo) {
  return photo.because_code === "unlike_training" && NEITHER ? NEITHER : `No label: ${photo.because}.`;
}

function newBar([name, probability]) {
  const bar = byId("bar-template").content.firstElementChild.cloneNode(true);
  slot(bar, "name").textContent = name;
  slot(bar, "value").textContent = percent(probability);
  slot(bar, "fill").setAttribute("width", (100 * probability).toFixed(2));
  return bar;
}

function showCard(item, photo, className = "") {
  const card = newCard({ name: item.name, ...photo });
  card.className = `card ${className}`.trim();
  const hadFocus = item.card?.contains(document.activeElement);
  item.card?.querySelector("img")?.removeAttribute("src"); // otherwise a preview that is still loading logs an error
  item.card?.replaceWith(card);
  item.card = card;
  if (hadFocus) card.querySelector("h3").focus();
}

function showWaiting(item, text) {
  showCard(item, { picture: item.preview, alt: "", problem: text }, "waiting");
  item.card.setAttribute("aria-busy", "true");
}

function showResult(item, row) {
  const format = row.format ? `${row.format}, ` : "";
  showCard(item, {
    ...row,
    picture: row.crop,
    original: item.preview,
    alt: `The part of ${item.name} that the model saw`,
    size: `${format}${integers.format(row.width)} \u00d7 ${integers.format(row.height)} pixels`,
  });
  return row.label === null ? `${item.name}: ${reason(row)}` : `${item.name}: ${row.label}, ${percent(row.confidence)}.`;
}

function showProblem(item, detail, canRetry = false) {
  const retry = canRetry && (() => {
    showWaiting(item, "Waiting\u2026");
    enqueue([item]);
  });
  showCard(item, { picture: canRetry && item.preview, alt: "", problem: detail, retry }, "bad");
  if (!canRetry) URL.revokeObjectURL(item.preview);
  return `${item.name}: ${detail}`;
}

function enlarge(figure) {
  const crop = figure.querySelector("img");
  const picture = viewer.querySelector("img");
  picture.alt = figure.closest(".card").querySelector(".file").textContent;
  viewer.querySelector("bdi").textContent = picture.alt;
  picture.onerror = () => { // a browser cannot show every format that the model can read
    picture.onerror = null;
    picture.src = crop.src;
  };
  picture.src = figure.dataset.original ?? crop.src;
  viewer.showModal();
}

// Requests: one at a time, each with as many photos as the server accepts

function accept(files) {
  const items = [...files].map((file, i) => ({
    file,
    name: file.name || `Photo ${i + 1}`,
    preview: URL.createObjectURL(file),
  }));
  showMessage(items.length ? "" : NO_IMAGE);
  if (!items.length) return;
  for (const item of items) showWaiting(item, "Waiting\u2026");
  cards.prepend(...items.map((item) => item.card));
  results.hidden = false;
  enqueue(items);
  const isBelow = items[0].card.getBoundingClientRect().top > innerHeight;
  if (isBelow) items[0].card.scrollIntoView({ block: "nearest" });
}

function enqueue(items) {
  queue.push(...items);
  total += items.length;
  if (!isBusy) run();
}

async function run() {
  isBusy = true;
  const sentences = [];
  while (queue.length) {
    showProgress();
    const batch = nextBatch();
    sentences.push(...(await classify(batch)));
    done += batch.length;
  }
  announce(sentences.length > 4 ? `${sentences.length} results. First result: ${sentences[0]}` : sentences.join(" "));
  isBusy = false;
  done = total = 0;
  showProgress();
}

function showProgress() {
  progress.box.hidden = !isBusy;
  progress.bar.max = Math.max(1, total);
  if (done) progress.bar.value = done;
  else progress.bar.removeAttribute("value"); // an indeterminate bar
  progress.text.textContent = total === 1 ? "Classifying\u2026" : `Classifying: ${done} of ${total} photos done`;
}

function nextBatch() {
  let bytes = OVERHEAD_BYTES;
  let count = 0;
  for (const { file } of queue.slice(0, MAX_IMAGES)) {
    bytes += file.size + OVERHEAD_BYTES;
    if (count && bytes > MAX_BYTES) break;
    count += 1;
  }
  return queue.splice(0, count);
}

async function classify(batch) {
  if (batch[0].file.size + 2 * OVERHEAD_BYTES > MAX_BYTES) {
    const limit = decimals.format(MAX_BYTES / 2 ** 20);
    return [showProblem(batch[0], `The file exceeds the ${limit} MB limit. Choose a smaller one.`)];
  }
  for (const item of batch) showWaiting(item, "Classifying\u2026");
  try {
    let response = await send(batch);
    if (response.status === 503 && response.headers.has("Retry-After")) {
      await pause(batch, Number(response.headers.get("Retry-After")) || 1);
      response = await send(batch);
    }
    return response.ok ? showPredictions(batch, await response.json()) : await showRejection(batch, response);
  } catch {
    return batch.map((item) => showProblem(item, "Could not reach the server, or the connection was lost.", true));
  }
}

function send(batch) {
  const body = new FormData();
  for (const { file, name } of batch) body.append("file", file, name);
  const headers = { Accept: "application/json" };
  if (keyField?.value) headers["X-API-Key"] = keyField.value.trim();
  return fetch(`${form.dataset.predict}?crop=1`, { method: "POST", body, headers });
}

async function pause(batch, seconds) {
  const text = `The server is busy. Retrying in ${seconds} s.`;
  for (const item of batch) showWaiting(item, text);
  announce(text);
  await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  for (const item of batch) showWaiting(item, "Classifying\u2026");
}

function showPredictions(batch, { predictions }) {
  return batch.map((item, i) =>
    predictions[i].error ? showProblem(item, predictions[i].error.detail) : showResult(item, predictions[i]),
  );
}

async function showRejection(batch, response) {
  const problem = await response.json().catch(() => ({ detail: `The server returned status ${response.status}.` }));
  const canRetry = response.status === 401 || response.status === 408 || response.status >= 500;
  if (response.status === 401 && keyField) {
    problem.detail = keyField.value ? "Unknown API key." : "Enter your API key above.";
    keyField.setAttribute("aria-invalid", "true");
    keyField.focus();
  }
  return batch.map((item) => showProblem(item, problem.detail, canRetry));
}

// Input

for (const input of [byId("files"), byId("camera")]) {
  input.addEventListener("change", () => {
    if (input.files.length) accept(input.files);
    input.value = "";
  });
}

form.addEventListener("submit", (event) => event.preventDefault());

zone.addEventListener("click", (event) => {
  if (!event.target.closest(".choose, button, #message")) byId("files").click();
});

byId("sample")?.addEventListener("click", async ({ currentTarget }) => {
  const response = await fetch(currentTarget.dataset.url).catch(() => null);
  if (response?.ok) accept([new File([await response.blob()], "sample.jpg")]);
  else showMessage("The sample photo could not be loaded.");
});

addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    accept(event.clipboardData.files);
  } else if (!event.target.closest("input")) showMessage(NO_IMAGE);
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  zone.classList.add("over");
});

addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) zone.classList.remove("over");
});

addEventListener("drop", (event) => {
  event.preventDefault();
  zone.classList.remove("over");
  const { files, types } = event.dataTransfer;
  if (!files.length && types.includes("text/uri-list")) showMessage(LINK);
  else accept(files);
});

cards.addEventListener("click", (event) => {
  const figure = event.target.closest(".crop");
  if (figure && slot(figure, "enlarge")) enlarge(figure);
});

byId("clear").addEventListener("click", () => {
  for (const card of cards.querySelectorAll(".card:not(.waiting)")) {
    const original = card.querySelector(".crop")?.dataset.original;
    if (original) URL.revokeObjectURL(original);
    card.remove();
  }
  if (!cards.children.length) results.hidden = true;
  byId("files").focus();
  announce("Results cleared.");
});

if (keyField) {
  const showForget = () => (forgetKey.hidden = !keyField.value);
  keyField.value = sessionStorage.getItem(KEY) ?? "";
  showForget();
  keyField.addEventListener("input", () => {
    keyField.removeAttribute("aria-invalid");
    sessionStorage.setItem(KEY, keyField.value);
    showForget();
  });
  forgetKey.addEventListener("click", () => {
    keyField.value = "";
    sessionStorage.removeItem(KEY);
    showForget();
    keyField.focus();
    announce("Key forgotten.");
  });
}
