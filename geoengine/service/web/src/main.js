// The page: a photo comes in, the search runs, and what is heard of it goes to the map and the panel.

import { about as fetchAbout, search } from "./api.js";
import { featureCollection } from "./geojson.js";
import { SearchMap } from "./map.js";
import { described, refusal } from "./problems.js";
import { element, levelRow, levelSentence, showBest, showCandidates } from "./results.js";

const byId = (id) => document.getElementById(id);
const map = new SearchMap(byId("map"), byId("overview"));
const SAMPLES = ["planet01", "planet05", "planet06"];
const WIDTHS = [4, 8, 16, 32, 64];
const RESULT_CARDS = ["result", "worth", "ranked", "path"];

let about = null, key = "", photo = null, running = null, result = null, chosen = null, countdown = 0;

// --- start ---

async function start() {
  try {
    about = await fetchAbout(key);
  } catch (problem) {
    if (problem.kind === 401) return askForKey(Boolean(key));
    return showProblem(described(problem, 0), start);
  }
  const hadFocus = byId("key-form").contains(document.activeElement);
  show("key-form", false);
  show("problem", false);
  show("pick", true);
  show("banner", about.world === "planet");
  show("samples", about.world === "planet");
  byId("about").textContent = `geoengine ${about.version} · ${about.model} · map: ${about.tiles.source ?? ""}`;
  map.setTiles(about.tiles, key);
  const { shown, reason } = about.tiles;
  if (!shown && about.world === "earth") map.showCoasts().catch(() => {}); // the search goes on without them
  byId("map-note").textContent = shown ? "" : `The map is not shown: ${reason || "the terms of its source do not allow it"}.`;
  show("map-note", !shown);
  offerOptions();
  if (hadFocus) byId("file").focus();
  if (photo) locate(); // it was chosen while the server did not answer, or asked for a key
}

function askForKey(wasWrong) {
  show("key-form", true);
  show("pick", false);
  if (wasWrong) showProblem({ title: "This key is not accepted", text: "Check it, or ask whoever runs this server." });
  byId("key").select();
  byId("key").focus();
}

function offerOptions() {
  const { defaults, limits, choices } = about;
  const widths = [...new Set([...WIDTHS, defaults.k])].filter((k) => k <= limits.max_k).sort((a, b) => a - b);
  byId("k").replaceChildren(...widths.map((k) => option(k, k === defaults.k)));
  for (const [name, values] of Object.entries(choices ?? {})) {
    if (!Array.isArray(values) || values.length < 2 || byId(name)) continue;
    const unnamed = defaults[name] == null ? [element("option", { value: "" }, "the best there is")] : [];
    const named = values.map((value) => option(value, value === defaults[name]));
    const select = element("select", { id: name }, ...unnamed, ...named);
    byId("fields").append(element("label", { for: name }, name[0].toUpperCase() + name.slice(1)), select);
  }
}

const option = (value, isDefault) => {
  const made = element("option", { value }, String(value));
  made.selected = isDefault;
  return made;
};

function parameters() {
  const chosenOnes = { top: Math.min(5, about.limits.max_top ?? 5) };
  for (const field of byId("fields").querySelectorAll("select, input")) {
    const value = field.value.trim();
    if (value && value !== String(about.defaults[field.id])) chosenOnes[field.id] = value;
  }
  return chosenOnes;
}

// --- a photo comes in ---

function take(file) {
  if (!file) return;
  photo = file;
  const picture = byId("preview");
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.hidden = false;
  picture.src = URL.createObjectURL(file);
  byId("photo-name").textContent = file.name || "pasted picture";
  if (about) locate();
}

async function takeSample(name) {
  try {
    const response = await fetch(`/static/samples/${name}.jpg`);
    if (!response.ok) throw new Error(response.statusText);
    take(new File([await response.blob()], `${name}.jpg`, { type: "image/jpeg" }));
  } catch {
    showProblem(described({ kind: "gone" }, 0), () => takeSample(name));
  }
}

// --- a search ---

async function locate() {
  running?.abort();
  clearResult();
  const no = refusal(photo, about.limits);
  if (no) return showProblem(no);
  const own = (running = new AbortController());
  byId("pick").classList.add("compact");
  show("run", true);
  show("stop", true);
  byId("status").textContent = "Sending the photo";
  byId("progress").removeAttribute("value");
  const seen = [];
  try {
    for await (const { event, data } of search(photo, parameters(), key, own.signal)) {
      if (own !== running) return;
      hear(event, data, seen);
    }
  } catch (problem) {
    if (own !== running) return;
    failed(problem, seen);
  } finally {
    if (own === running) finished();
  }
}

function hear(event, data, seen) {
  if (event === "accepted") {
    byId("status").textContent = data.waiting ? `Waiting: ${data.waiting} before this one` : "Searching";
  } else if (event === "progress") {
    byId("progress").value = (data.index + data.done / Math.max(1, data.total)) / data.levels;
  } else if (event === "level") {
    seen.push(data);
    byId("progress").value = (data.index + 1) / data.levels;
    if (seen.length === 1) bringIntoView();
    byId("status").textContent = levelSentence(data, data.index + 1, data.levels);
    byId("levels").append(levelRow(data, null, null));
    show("path", true);
    show("legend", true);
    map.addLevel(data);
  } else if (event === "result") {
    result = data;
    showResult();
  }
}

// On a phone the map lies below the photo, and what happens there is what one wants to see.
function bringIntoView() {
  if (matchMedia("(max-width: 800px)").matches) byId("run").scrollIntoView({ block: "start" });
}

function failed(problem, seen) {
  if (problem.name === "AbortError") {
    byId("status").textContent = seen.length ? `Stopped after level ${seen.length}` : "Stopped";
    return;
  }
  if (problem.kind === 401) {
    askForKey(Boolean(key));
    return;
  }
  byId("status").textContent = "";
  show("run", seen.length > 0);
  showProblem(described(problem, seen.length), locate, problem.retryAfter);
}

function finished() {
  const hadFocus = document.activeElement === byId("stop");
  running = null;
  show("stop", false);
  if (!byId("progress").hasAttribute("value")) byId("progress").value = 0;
  if (hadFocus) (result ? byId("result-title") : byId("file")).focus();
}

function clearResult() {
  result = chosen = null;
  map.clear();
  byId("levels").replaceChildren();
  byId("done").textContent = "";
  for (const id of [...RESULT_CARDS, "problem", "legend"]) show(id, false);
}

// --- a result ---

function showResult() {
  const best = result.candidates[0];
  byId("progress").value = 1;
  const took = result.seconds >= 0.1 ? `in ${result.seconds.toFixed(1)} s` : "in under 0.1 s";
  byId("status").textContent = `Done ${took}. The best guess is below.`;
  showBest(result);
  for (const id of RESULT_CARDS) show(id, id !== "path" || result.levels.length > 0);
  show("legend", true);
  choose(best, () => map.showResult(result, best));
}

function choose(candidate, draw = () => map.showCandidate(result, candidate)) {
  const focused = [...byId("candidates").querySelectorAll("button")].indexOf(document.activeElement);
  chosen = candidate;
  showCandidates(result, chosen, choose);
  byId("levels").replaceChildren(...result.levels.map((level, i) =>
    levelRow(level, chosen, () => map.showStep(result, chosen, i), result.scoring)));
  if (focused >= 0) byId("candidates").querySelectorAll("button")[focused].focus();
  draw();
}

async function copyCoordinates() {
  const text = `${chosen.latitude.toFixed(7)}, ${chosen.longitude.toFixed(7)}`;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard: not a secure page, or not allowed
    const field = element("textarea", { readonly: "" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    byId("copy").focus();
  }
  byId("done").textContent = `Copied: ${text}`;
}

function download() {
  const data = JSON.stringify(featureCollection(result)) + "\n";
  const url = URL.createObjectURL(new Blob([data], { type: "application/geo+json" }));
  const link = element("a", { href: url, download: "geoengine.geojson" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  byId("done").textContent = "Saved as geoengine.geojson";
}

// --- problems ---

function showProblem({ title, text, again }, retry = null, waitS = 0) {
  byId("problem-title").textContent = title;
  byId("problem-text").textContent = text;
  const button = byId("retry");
  button.hidden = !(again && retry);
  button.onclick = () => { show("problem", false); retry(); };
  clearInterval(countdown);
  const until = Date.now() + 1000 * waitS;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(countdown);
  };
  if (waitS > 0) countdown = setInterval(tick, 250);
  tick();
  show("problem", true);
  byId("problem").scrollIntoView({ block: "nearest" });
}

function show(id, shown) {
  byId(id).toggleAttribute("hidden", !shown);
}

// --- what the user does ---

byId("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (file) take(file);
});
let dragged = 0;
document.addEventListener("dragenter", () => byId("drop").classList.toggle("over", ++dragged > 0));
document.addEventListener("dragleave", () => byId("drop").classList.toggle("over", --dragged > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  byId("drop").classList.remove("over");
  take(event.dataTransfer?.files[0]);
});
byId("preview").addEventListener("error", () => { byId("preview").hidden = true; }); // HEIC, for one, is not shown
byId("stop").addEventListener("click", () => running?.abort());
byId("copy").addEventListener("click", copyCoordinates);
byId("download").addEventListener("click", download);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  start();
});
for (const name of SAMPLES) {
  const picture = element("img", { src: `/static/samples/${name}.jpg`, alt: `Sample photo ${name}`, loading: "lazy", width: 96, height: 72 });
  const button = element("button", { type: "button" }, picture);
  button.addEventListener("click", () => takeSample(name));
  byId("samples").querySelector("[role=group]").append(button);
}

start();
