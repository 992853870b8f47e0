// Photos that were dropped, pasted, chosen or taken go to /predict; each has a card at once, which its answer then fills.

const root = document.documentElement;
const find = (id) => document.getElementById(id);
const form = find("classify");
const zone = find("zone");
const keyField = find("key");
const results = find("results");
const cards = find("cards");
const said = find("said");
const progress = { box: find("progress"), bar: find("progress-bar"), text: find("progress-text") };

const MAX_IMAGES = Number(form.dataset.maxImages);
const MAX_BYTES = Number(form.dataset.maxBytes);
const SHOWN = Number(form.dataset.shown);
const PART_BYTES = 1024; // what a form adds to each photo, at most
const KEY = "key";

const waiting = [];
let isBusy = false;
let done = 0;
let wanted = 0;

root.classList.add("js");

// Words

const decimals = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en");

// As the server writes it: a probability is never quite 0 or 1, though it may come so, rounded.
function percent(share) {
  if (share < 0.0005) return "<\u202f0.1\u202f%";
  if (share >= 0.9995) return ">\u202f99.9\u202f%";
  return `${decimals.format(100 * share)}\u202f%`;
}

function say(text) {
  said.textContent = "";
  requestAnimationFrame(() => (said.textContent = text));
}

// Cards

function slot(element, name) {
  return element.querySelector(`[data-slot="${name}"]`);
}

function setSlot(element, name, text) {
  const found = slot(element, name);
  if (text) found.textContent = text;
  else found.remove();
}

function newCard(photo) {
  const card = find("card-template").content.firstElementChild.cloneNode(true);
  const name = slot(card, "file");
  name.textContent = name.title = photo.name;
  const notes = slot(card, "notes");
  for (const text of photo.notes ?? []) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = text;
    notes.append(note);
  }
  const picture = slot(card, "crop");
  if (photo.picture) {
    picture.alt = photo.alt;
    picture.addEventListener("error", () => picture.closest("figure").remove());
    picture.src = photo.picture;
  } else picture.closest("figure").remove();
  if (!photo.isSeen) card.querySelector("figcaption")?.remove();
  setSlot(card, "problem", photo.problem);
  setSlot(card, "size", photo.size);
  if (photo.again) slot(card, "again").addEventListener("click", photo.again);
  else slot(card, "again").remove();
  fillBars(card, photo);
  return card;
}

function fillBars(card, photo) {
  if (!photo.label) {
    for (const name of ["label", "bars", "more"]) slot(card, name).closest(".verdict, .bars, .more").remove();
    return;
  }
  setSlot(card, "label", photo.label);
  setSlot(card, "share", percent(photo.confidence));
  const bars = Object.entries(photo.probabilities).sort((a, b) => b[1] - a[1]);
  slot(card, "bars").append(...bars.slice(0, SHOWN).map(newBar));
  if (bars.length <= SHOWN) return slot(card, "more").remove();
  setSlot(card, "count", whole.format(bars.length));
  const others = slot(card, "others");
  slot(card, "more").addEventListener("toggle", () => others.append(...bars.slice(SHOWN).map(newBar)), { once: true });
}

function newBar([name, share]) {
  const bar = find("bar-template").content.firstElementChild.cloneNode(true);
  slot(bar, "name").textContent = name;
  slot(bar, "value").textContent = percent(share);
  slot(bar, "fill").setAttribute("width", (100 * share).toFixed(2));
  return bar;
}

function show(item, photo, className = "") {
  const card = newCard({ name: item.name, ...photo });
  card.className = `card ${className}`.trim();
  const hadFocus = item.card?.contains(document.activeElement);
  item.card?.querySelector("img")?.removeAttribute("src"); // or a preview that is still being read is missed
  item.card?.replaceWith(card);
  item.card = card;
  if (hadFocus) card.querySelector("h3").focus();
}

function showWaiting(item, text) {
  show(item, { picture: item.preview, alt: "", problem: text }, "waiting");
  item.card.setAttribute("aria-busy", "true");
}

function showAnswer(item, row) {
  const kind = row.format ? `${row.format}, ` : "";
  show(item, {
    ...row,
    picture: row.crop,
    alt: `The part of ${item.name} that the model saw`,
    isSeen: true,
    size: `${kind}${whole.format(row.width)} \u00d7 ${whole.format(row.height)} pixels`,
  });
  URL.revokeObjectURL(item.preview);
  return `${item.name}: ${row.label}, ${percent(row.confidence)}.`;
}

function showProblem(item, detail, mayTryAgain = false) {
  const again = mayTryAgain && (() => {
    showWaiting(item, "Waiting\u2026");
    take([item]);
  });
  show(item, { picture: mayTryAgain && item.preview, alt: "", problem: detail, again }, "bad");
  if (!mayTryAgain) URL.revokeObjectURL(item.preview);
  return `${item.name}: ${detail}`;
}

// The way to the server: one request at a time, each with as many photos as it may hold

function accept(files) {
  const items = [...files].map((file, i) => ({
    file,
    name: file.name || `Photo ${i + 1}`,
    preview: URL.createObjectURL(file),
  }));
  if (!items.length) return say("There was no photo in that. Drop or paste a picture's file.");
  for (const item of items) showWaiting(item, "Waiting\u2026");
  cards.prepend(...items.map((item) => item.card));
  results.hidden = false;
  take(items);
  items[0].card.scrollIntoView({ block: "nearest" });
}

function take(items) {
  waiting.push(...items);
  wanted += items.length;
  if (!isBusy) run();
}

async function run() {
  isBusy = true;
  const sentences = [];
  while (waiting.length) {
    showProgress();
    const batch = nextBatch();
    sentences.push(...(await classify(batch)));
    done += batch.length;
  }
  say(sentences.length > 4 ? `${sentences.length} photos are done. The first: ${sentences[0]}` : sentences.join(" "));
  isBusy = false;
  done = wanted = 0;
  showProgress();
}

function showProgress() {
  progress.box.hidden = !isBusy;
  progress.bar.max = Math.max(1, wanted);
  if (done) progress.bar.value = done;
  else progress.bar.removeAttribute("value"); // which browsers draw as "under way"
  progress.text.textContent = wanted === 1 ? "Classifying\u2026" : `Classifying: ${done} of ${wanted} photos are done`;
}

function nextBatch() {
  let bytes = PART_BYTES;
  let count = 0;
  for (const { file } of waiting.slice(0, MAX_IMAGES)) {
    bytes += file.size + PART_BYTES;
    if (count && bytes > MAX_BYTES) break;
    count += 1;
  }
  return waiting.splice(0, count);
}

async function classify(batch) {
  if (batch[0].file.size + 2 * PART_BYTES > MAX_BYTES) {
    const most = decimals.format(MAX_BYTES / 2 ** 20);
    return [showProblem(batch[0], `The file is larger than ${most} MiB, which is the most; choose a smaller one.`)];
  }
  for (const item of batch) showWaiting(item, "Classifying\u2026");
  try {
    let answer = await send(batch);
    if (answer.status === 503 && answer.headers.has("Retry-After")) {
      await pause(batch, Number(answer.headers.get("Retry-After")) || 1);
      answer = await send(batch);
    }
    return answer.ok ? await showAnswers(batch, await answer.json()) : await refuse(batch, answer);
  } catch {
    return batch.map((item) => showProblem(item, "The server could not be reached, or broke off.", true));
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
  const text = `The server is busy; this is sent once more in ${seconds} s.`;
  for (const item of batch) showWaiting(item, text);
  say(text);
  await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  for (const item of batch) showWaiting(item, "Classifying\u2026");
}

function showAnswers(batch, { predictions }) {
  return batch.map((item, i) =>
    predictions[i].error ? showProblem(item, predictions[i].error.detail) : showAnswer(item, predictions[i]),
  );
}

async function refuse(batch, answer) {
  const problem = await answer.json().catch(() => ({ detail: `The server answered ${answer.status}.` }));
  const mayTryAgain = answer.status === 401 || answer.status === 408 || answer.status >= 500;
  if (answer.status === 401 && keyField) {
    problem.detail = keyField.value ? "That key is not one that is known here." : "A key is wanted here; type it into the field Key.";
    keyField.setAttribute("aria-invalid", "true");
    keyField.focus();
  }
  return batch.map((item) => showProblem(item, problem.detail, mayTryAgain));
}

// What a person does

for (const input of [find("files"), find("camera")]) {
  input.addEventListener("change", () => {
    if (input.files.length) accept(input.files);
    input.value = "";
  });
}

form.addEventListener("submit", (event) => event.preventDefault());

zone.addEventListener("click", (event) => {
  if (!event.target.closest(".choose")) find("files").click();
});

addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    accept(event.clipboardData.files);
  }
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
  accept(event.dataTransfer.files);
});

find("clear").addEventListener("click", () => {
  for (const card of cards.querySelectorAll(".card:not(.waiting)")) card.remove();
  if (!cards.children.length) results.hidden = true;
  find("files").focus();
  say("The answers are cleared.");
});

if (keyField) {
  keyField.value = sessionStorage.getItem(KEY) ?? "";
  keyField.addEventListener("input", () => {
    keyField.removeAttribute("aria-invalid");
    sessionStorage.setItem(KEY, keyField.value);
  });
}
