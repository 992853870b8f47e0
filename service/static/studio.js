// Upload dropped or chosen folders, photos and zips to a dataset, follow tasks, and select photos with the keyboard.

const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const place = document.querySelector("[data-upload]");
const box = byId("upload");
const problemBox = byId("upload-problem");
const integers = new Intl.NumberFormat("en");

const PARALLEL = 3; // photos that are sent at a time
const PIECE = 8 * 2 ** 20; // of a zip
const RETRIES = 4;
const MAX_LISTED = 5;
const POLL_MS = 2000; // between two looks at a task
const ADDED = "The upload has finished.";
const UNREACHABLE = "The server cannot be reached. Drop the same files again to continue.";

let stopped = null; // the AbortController of the current upload
let isInUse = false; // since the page was loaded, or since the last upload began

root.classList.add("js");

const plural = (count, noun) => `${integers.format(count)} ${noun}${count === 1 ? "" : "s"}`;

function announce(text) {
  const status = byId("status");
  status.textContent = "";
  requestAnimationFrame(() => (status.textContent = text));
}

function showProblem(text, rows = []) {
  problemBox.hidden = !text;
  problemBox.classList.toggle("calm", !rows.length && text === ADDED);
  problemBox.querySelector("p").textContent = text;
  const items = rows.slice(0, MAX_LISTED).map((row) => {
    const item = document.createElement("li");
    item.textContent = row;
    return item;
  });
  problemBox.querySelector("ul").replaceChildren(...items);
}

// The page changes automatically only while it is not in use: what is added would move what is about to be pressed.

for (const kind of ["pointerdown", "keydown", "input", "wheel", "touchmove"]) {
  addEventListener(kind, () => (isInUse = true), { capture: true, passive: true });
}

// Show an address now if the page is not in use, else show a link to it in an element.
function showNext(url, element, text, label) {
  if (isInUse) {
    const link = document.createElement("a");
    link.href = url;
    link.textContent = label;
    element.replaceChildren(text, " ", link);
  } else if (url === location.pathname + location.search) location.reload();
  else location.assign(url);
}

function showProgress(text, done, total) {
  box.hidden = false;
  byId("upload-text").textContent = text;
  const bar = byId("upload-bar");
  bar.max = Math.max(1, total);
  if (total) bar.value = done;
  else bar.removeAttribute("value");
}

// Requests

class Rejected extends Error {}

// Send a request, and again if the connection is lost or the server is busy.
async function send(url, options = {}) {
  for (let attempt = 0; ; attempt += 1) {
    const response = await fetch(url, {
      ...options,
      headers: { Accept: "application/json", ...options.headers },
      signal: stopped.signal,
    }).catch((error) => {
      if (error.name === "AbortError" || attempt >= RETRIES) throw error;
      return null;
    });
    if (response?.ok) return response.json();
    if (response && response.status !== 503 && response.status !== 408) {
      const problem = await response.json().catch(() => ({}));
      const detail = response.status === 401 ? "Sign in with a key first." : problem.detail;
      throw Object.assign(new Rejected(detail ?? `The server returned status ${response.status}.`), { status: response.status });
    }
    if (attempt >= RETRIES) throw new Rejected("The server is busy. Drop the same files again to continue.");
    const seconds = Number(response?.headers.get("Retry-After")) || 2 ** attempt;
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

const sendJson = (url, body) =>
  send(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// Files of a drop

async function entriesOf(directory) {
  const reader = directory.createReader();
  const found = [];
  for (;;) {
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!batch.length) return found;
    found.push(...batch);
  }
}

async function collect(entry, path, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    found.push([`${path}${file.name}`, file]);
  } else {
    for (const inner of await entriesOf(entry)) await collect(inner, `${path}${entry.name}/`, found);
  }
}

async function filesOfDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // before anything is awaited
  const plain = [...transfer.files].map((file) => [file.name, file]);
  if (!entries.length) return plain;
  const found = [];
  for (const entry of entries) await collect(entry, "", found);
  return found;
}

// Uploads

async function createDataSet() {
  if (place.dataset.set) return place.dataset.set;
  const made = await sendJson(place.dataset.url, { name: byId("name").value.trim() });
  place.dataset.set = `${place.dataset.url}/${encodeURIComponent(made.name)}`;
  return place.dataset.set;
}

async function upload(files, cls) {
  if (stopped) return showProblem("An upload is running. Wait until it has finished.");
  stopped = new AbortController();
  isInUse = false;
  showProblem("");
  try {
    const zips = files.filter(([path]) => /\.zip$/i.test(path));
    if (zips.length && files.length > 1) throw new Rejected("Add one zip at a time, without other files.");
    const set = await createDataSet();
    const rejected = zips.length ? await uploadZip(set, zips[0][1]) : await uploadPhotos(set, files, cls);
    const text = rejected.length ? `${plural(rejected.length, "file")} could not be added. All others were.` : ADDED;
    if (rejected.length) isInUse = true; // their names have to be read
    if (isInUse) showProblem(text, rejected);
    stopped = null; // leaving the page needs no confirmation now
    showNext(set, problemBox.querySelector("p"), text, "Show the dataset");
  } catch (error) {
    if (error.name === "AbortError") showProblem("Stopped. Drop the same files again to continue.");
    else showProblem(error instanceof Rejected ? error.message : UNREACHABLE);
  } finally {
    box.hidden = true;
    stopped = null;
  }
}

async function uploadPhotos(set, files, cls) {
  showProgress("Comparing with what is there", 0, 0);
  const rows = files.map(([path, file]) => [path, file.size]);
  const body = cls === undefined ? { files: rows } : { files: rows, class: cls };
  const plan = await sendJson(`${set}/missing`, body);
  const byPath = new Map(files);
  const queue = plan.missing.slice();
  const rejected = plan.skipped
    .filter((path) => !/(^|\/)(\.|__|thumbs\.db|desktop\.ini)/i.test(path))
    .map((path) => `${path}: This is not an image.`);
  const total = queue.length + plan.present;
  if (!total) throw new Rejected("No photos were found. Choose photos, or a folder with photos.");
  let done = plan.present;
  const maxBytes = Number(place.dataset.maxBytes);
  announce(`Uploading ${plural(queue.length, "photo")}.`);

  const work = async () => {
    while (queue.length) {
      showProgress(`Uploading: ${integers.format(done)} of ${plural(total, "photo")}`, done, total);
      const { path, photo } = queue.shift();
      const file = byPath.get(path);
      if (file.size > maxBytes) rejected.push(`${path}: The file exceeds ${maxBytes / 2 ** 20} MB.`);
      else {
        const address = photo.split("/").map(encodeURIComponent).join("/");
        const headers = { "Content-Type": "application/octet-stream" };
        await send(`${set}/photos/${address}`, { method: "PUT", headers, body: file }).catch((error) => {
          const isOfFile = [413, 415, 422, 400].includes(error.status) && !/dataset|disk/i.test(error.message);
          if (!isOfFile) throw error;
          rejected.push(`${path}: ${error.message}`);
        });
      }
      done += 1;
    }
  };
  await Promise.all(Array.from({ length: PARALLEL }, work));
  return rejected;
}

async function uploadZip(set, file) {
  let { received, total } = await send(`${set}/archive`);
  if (total !== file.size) received = 0; // of another zip
  for (;;) {
    showProgress(`Uploading ${file.name}`, received, file.size);
    const piece = file.slice(received, received + Math.min(PIECE, Number(place.dataset.maxBytes)));
    const headers = { "Content-Type": "application/octet-stream" };
    const url = `${set}/archive?offset=${received}&total=${file.size}`;
    ({ received } = await send(url, { method: "PUT", headers, body: piece }));
    if (received >= file.size) return [];
  }
}

if (place) {
  for (const input of document.querySelectorAll("[data-files]")) {
    input.addEventListener("change", () => {
      const files = [...input.files].map((file) => [file.webkitRelativePath || file.name, file]);
      input.value = "";
      const from = input.dataset.classFrom && byId(input.dataset.classFrom);
      if (from && !from.value.trim()) {
        from.setAttribute("aria-invalid", "true");
        from.focus();
        return showProblem("Enter the name of the class first.");
      }
      if (files.length) upload(files, from ? from.value.trim() : input.dataset.class);
    });
  }
  byId("new")?.addEventListener("submit", (event) => event.preventDefault());
  byId("upload-stop").addEventListener("click", () => stopped?.abort());
  byId("upload-close").addEventListener("click", () => showProblem(""));

  const target = (event) => event.target.closest?.("[data-drop]") ?? document.querySelector(".zone[data-drop]");
  const mark = (element) => {
    for (const other of document.querySelectorAll(".over")) if (other !== element) other.classList.remove("over");
    element?.classList.add("over");
  };
  addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(target(event));
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) mark(null);
  });
  addEventListener("drop", async (event) => {
    event.preventDefault();
    mark(null);
    const cls = target(event)?.dataset.class;
    const files = await filesOfDrop(event.dataTransfer).catch(() => []);
    if (files.length) upload(files, cls);
    else showProblem("No files were found. Drop a folder, photos or a zip.");
  });
  addEventListener("beforeunload", (event) => {
    if (stopped) event.preventDefault();
  });
}

// An import, a check or suggestions that the server computes

const task = document.querySelector("[data-task]");

async function follow() {
  const response = await fetch(location.href, { headers: { Accept: "text/html" } }).catch(() => null);
  if (!response?.ok) return setTimeout(follow, POLL_MS); // the server is being restarted
  const next = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("[data-task]");
  if (next) {
    task.replaceChildren(...next.childNodes);
    return setTimeout(follow, POLL_MS);
  }
  const text = document.createElement("p");
  if (isInUse) task.replaceChildren(text); // of the same height
  showNext(location.pathname + location.search, text, "Finished.", "Show the result");
}

if (task) setTimeout(follow, POLL_MS);

// A form returns to its page: keep the position, so that its buttons stay under the pointer

const SCROLLED = "scrolled";
const here = location.pathname + location.search;

addEventListener("submit", (event) => {
  if (!event.defaultPrevented) sessionStorage.setItem(SCROLLED, JSON.stringify([here, scrollY]));
});
const [page, y] = JSON.parse(sessionStorage.getItem(SCROLLED) ?? "[]");
if (page === here) scrollTo({ top: y, behavior: "instant" });
sessionStorage.removeItem(SCROLLED);

// Photos to select: click, Shift for a range, and a key for each place to move them to

const selection = document.querySelector("[data-selection]");

if (selection) {
  const boxes = [...selection.querySelectorAll('input[type="checkbox"]')];
  let last = null;
  const update = () => {
    selection.querySelector("[data-count]").textContent = boxes.filter((each) => each.checked).length;
  };
  selection.addEventListener("click", (event) => {
    const clicked = boxes.indexOf(event.target);
    if (clicked < 0) return;
    if (event.shiftKey && last !== null) {
      for (const each of boxes.slice(Math.min(last, clicked), Math.max(last, clicked) + 1)) each.checked = event.target.checked;
    }
    last = clicked;
    update();
  });
  selection.addEventListener("change", update);
  selection.querySelector("[data-select-all]").addEventListener("click", () => {
    const all = boxes.every((each) => each.checked);
    for (const each of boxes) each.checked = !all;
    update();
  });
  for (const button of selection.querySelectorAll("[data-select-suggested]")) {
    button.addEventListener("click", () => {
      for (const each of boxes) each.checked = each.dataset.suggestion === button.dataset.selectSuggested;
      update();
    });
  }
  addEventListener("keydown", (event) => {
    const isTyping = event.target.matches?.('input:not([type="checkbox"]), select, textarea');
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const button = selection.querySelector(`[data-shortcut="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!button) return;
    const focused = document.activeElement?.closest(".pick")?.querySelector("input");
    if (focused && !boxes.some((each) => each.checked)) focused.checked = true;
    event.preventDefault();
    button.click();
  });
  update();
}
