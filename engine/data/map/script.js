"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const EARTH_KM = 6371.0088, EQUATOR_KM = 2 * Math.PI * EARTH_KM, RAD = Math.PI / 180;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let photo = data.photos[0], stages = photo.levels, chosen = photo.candidates[0], step = 0, timer = 0, frame = 0;
let view = { x: 0.5, y: 0.5, scale: 500 };  // centre in world widths, pixels per world width

// --- small helpers; text only ever enters the page as text nodes and attributes ---
function node(parent, name, attributes, text) {
  const made = parent instanceof SVGElement ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}
const degrees = (lat, lng) => `${lat.toFixed(5)}, ${lng.toFixed(5)}`;
function km(value) {
  if (value < 1) return `${Math.round(value * 1000)} m`;
  return value < 100 ? `${value.toFixed(1)} km` : `${Math.round(value).toLocaleString("en")} km`;
}
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const worldX = (lng) => lng / 360 + 0.5;
const worldY = (lat) => {
  const s = Math.sin(Math.max(-85.0511, Math.min(85.0511, lat)) * RAD);
  return 0.5 - Math.log((1 + s) / (1 - s)) / (4 * Math.PI);
};
const latitude = (y) => Math.atan(Math.sinh(Math.PI * (1 - 2 * y))) / RAD;
const box = (t) => { const n = 2 ** t.z; return [t.x / n, t.y / n, (t.x + 1) / n, (t.y + 1) / n]; };
const size = () => [byId("map").clientWidth || 600, byId("map").clientHeight || 400];
const key = (t) => `${t.z}/${t.x}/${t.y}`;

// The world repeats every world width: the copies of [x0, x1] that meet the view. The whole world is shown once.
function copies(x0, x1) {
  const [w] = size(), half = w / view.scale / 2;
  if (half > 0.45) return [0];
  return [-1, 0, 1].filter((d) => x1 + d > view.x - half && x0 + d < view.x + half);
}
const px = (x) => (x - view.x) * view.scale + size()[0] / 2;
const py = (y) => (y - view.y) * view.scale + size()[1] / 2;

// An answer that needed no tiles has no levels: its steps are the world, and the answer with its radius.
function withoutLevels() {
  const across = (EQUATOR_KM * Math.cos(photo.latitude * RAD)) / (8 * Math.max(photo.radius_km, 0.1));
  return [{ zoom: 0, beam: [] }, { zoom: Math.max(2, Math.min(14, Math.round(Math.log2(across)) + 2)), beam: [] }];
}

// The tile of a level that the chosen candidate lies in, whether that level has scored it or not.
function stage(i) {
  const z = stages[i].zoom, side = 2 ** (chosen.z - z);
  return { z, x: Math.floor(chosen.x / side), y: Math.floor(chosen.y / side) };
}

// --- the view of a step: the world first, then the tile kept before, with a margin of a quarter of it ---
function target(i) {
  const [w, h] = size(), room = Math.min(w, h);
  if (i === 0) return { x: 0.5, y: 0.5, scale: room };
  const tile = stage(i), z = Math.max(stages[i - 1].zoom, tile.z - 2), n = 2 ** z;
  const shrink = 2 ** (tile.z - z);
  const x = (Math.floor(tile.x / shrink) + 0.5) / n, y = (Math.floor(tile.y / shrink) + 0.5) / n;
  return { x, y, scale: (room * n) / 1.5 };
}

function glide(to) {
  cancelAnimationFrame(frame);
  const from = { ...view }, start = performance.now(), duration = calm.matches ? 0 : 650;
  const tick = (now) => {
    // A frame's time may lie a little before the call that asked for it.
    const t = duration ? Math.max(0, Math.min(1, (now - start) / duration)) : 1, e = t * t * (3 - 2 * t);
    const scale = from.scale * (to.scale / from.scale) ** e;
    // Moves the centre so that the point both views agree on stays where it is on the screen.
    const part = Math.abs(to.scale / from.scale - 1) < 1e-6 ? e : (1 / from.scale - 1 / scale) / (1 / from.scale - 1 / to.scale);
    view = { x: from.x + (to.x - from.x) * part, y: from.y + (to.y - from.y) * part, scale };
    if (t >= 1) view = { ...to };
    draw();
    if (t < 1) frame = requestAnimationFrame(tick);
  };
  if (duration) frame = requestAnimationFrame(tick); else tick(start);
}

// --- drawing ---
function draw() {
  const [w, h] = size(), overlay = byId("overlay"), labels = byId("labels");
  const whole = w / view.scale / 2 > 0.45;
  set(byId("world-rect"), whole ? { x: px(0), y: py(0), width: view.scale, height: view.scale }
    : { x: 0, y: py(0), width: w, height: view.scale });
  drawImages(Math.min(w, h));
  overlay.replaceChildren();
  labels.replaceChildren();
  drawShade(overlay, w, h);
  drawGraticule(overlay, labels, w, h);
  if (step > 0) for (const name of ["before-halo", "before"])
    for (const tile of stages[step - 1].beam) tileRect(overlay, tile, name, {});
  drawBeam(overlay);
  drawRadius(overlay);
  drawPins(labels);
  drawMini(w, h, whole);
  drawScale();
}
function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}
function drawImages(room) {
  data.images.forEach((image, i) => {
    const [x0, y0, x1, y1] = image.box, wide = (x1 - x0) * view.scale, element = byId("images").children[i];
    const shift = copies(x0, x1)[0];
    // Pictures of finer levels appear only when they fill the view; those much coarser have nothing to show.
    const opacity = i === 0 ? 1 : Math.max(0, Math.min(1, (wide / room - 0.6) / 0.4));
    const shown = shift !== undefined && opacity > 0 && wide < 25 * room;
    element.style.display = shown ? "" : "none";
    if (shown) set(element, { x: px(x0 + shift), y: py(y0), width: wide, height: (y1 - y0) * view.scale, opacity });
  });
}
function drawShade(parent, w, h) {
  if (!photo.levels.length) return;
  const corners = (x0, y0, x1, y1) => `M${x0},${y0}H${x1}V${y1}H${x0}Z`;
  let d = corners(-1, -1, w + 1, h + 1);
  for (const tile of stages[step].beam) {
    const [x0, y0, x1, y1] = box(tile);
    for (const shift of copies(x0, x1)) d += corners(px(x0 + shift), py(y0), px(x1 + shift), py(y1));
  }
  node(parent, "path", { d, class: "shade" });
}
function drawGraticule(overlay, labels, w, h) {
  const across = (Math.min(w, h) / view.scale) * 360;
  const spacing = [30, 10, 5, 2, 1, .5, .2, .1, .05, .02, .01, .005, .002, .001].find((s) => across / s >= 3) || .001;
  const digits = Math.max(0, -Math.floor(Math.log10(spacing) + 1e-9));
  const x0 = view.x - w / view.scale / 2, x1 = view.x + w / view.scale / 2;
  const left = Math.max(8, px(0) + 4), whole = x1 - x0 > 0.9;
  const west = whole ? -180 : (x0 - 0.5) * 360, east = whole ? 180 : (x1 - 0.5) * 360;
  for (let i = Math.ceil(west / spacing); i * spacing <= east; i++) {
    const lng = i * spacing, x = px(worldX(lng)), shown = whole ? lng : ((((lng + 180) % 360) + 360) % 360) - 180;
    node(overlay, "line", { x1: x, x2: x, y1: Math.max(0, py(0)), y2: Math.min(h, py(1)), class: "grid" });
    if (i % 2 === 0 && x < w - (whole ? 40 : 0.24 * w + 60))
      node(labels, "text", { x: x + 4, y: 16, class: "degrees" }, `${shown.toFixed(digits)}°`);
  }
  const north = latitude(Math.max(0, view.y - h / view.scale / 2)), south = latitude(Math.min(1, view.y + h / view.scale / 2));
  for (let i = Math.ceil(south / spacing); i * spacing <= north; i++) {
    const y = py(worldY(i * spacing));
    node(overlay, "line", { x1: whole ? px(0) : 0, x2: whole ? px(1) : w, y1: y, y2: y, class: "grid" });
    if (i % 2 === 0 && y > 40 && y < h - 50)
      node(labels, "text", { x: left, y: y - 4, class: "degrees" }, `${(i * spacing).toFixed(digits)}°`);
  }
}
function tileRect(parent, tile, name, attributes) {
  const [x0, y0, x1, y1] = box(tile), side = (x1 - x0) * view.scale, grown = Math.max(0, 5 - side) / 2;
  return copies(x0, x1).map((shift) => node(parent, "rect", {
    x: px(x0 + shift) - grown, y: py(y0) - grown, width: side + 2 * grown, height: (y1 - y0) * view.scale + 2 * grown,
    class: name, ...attributes,
  }));
}
function drawBeam(parent) {
  if (!photo.levels.length) return;
  const beam = stages[step].beam, best = beam[0].score, worst = beam[beam.length - 1].score;
  for (const tile of beam) tileRect(parent, tile, "tile-halo", {});
  beam.forEach((tile, i) => {
    const strength = best > worst ? (tile.score - worst) / (best - worst) : 1;
    for (const rect of tileRect(parent, tile, "tile", { "fill-opacity": (0.06 + 0.34 * strength).toFixed(3) }))
      node(rect, "title", {}, `tile ${key(tile)}, rank ${i + 1} of ${beam.length}, score ${tile.score.toFixed(3)}`);
  });
  for (const name of ["path-halo", "path"]) tileRect(parent, stage(step), name, {});
}

// A circle on the sphere as [outline, rings to fill]. Around a pole its outline runs once round the world; around both it is everything but a cap.
function circle(lat, lng, r) {
  const points = [];
  for (let i = 0; i <= 120; i++) {
    const bearing = i * 3 * RAD, s = Math.sin(lat) * Math.cos(r) + Math.cos(lat) * Math.sin(r) * Math.cos(bearing);
    const d = Math.atan2(Math.sin(bearing) * Math.sin(r) * Math.cos(lat), Math.cos(r) - Math.sin(lat) * s);
    points.push([worldX((lng + d) / RAD), worldY(Math.asin(Math.max(-1, Math.min(1, s))) / RAD)]);
  }
  const north = lat + r > Math.PI / 2, south = lat - r < -Math.PI / 2;
  if (north && south) {
    const x = worldX(lng / RAD), hole = circle(-lat, lng + Math.PI, Math.PI - r)[0];
    return [hole, [[[x, 0], [x + 1, 0], [x + 1, 1], [x, 1]], hole]];
  }
  if (north || south) {
    const edge = north ? 0 : 1, sorted = points.slice(0, 120).sort((a, b) => a[0] - b[0]);
    const middle = (sorted[0][1] + sorted[119][1]) / 2, x = worldX(lng / RAD);
    const line = [[x - .5, middle], ...sorted, [x + .5, middle]];
    return [line, [[[x - .5, edge], ...line, [x + .5, edge]]]];
  }
  return [points, [points]];
}
function drawRadius(parent) {
  const r = Math.min(photo.radius_km / EARTH_KM, Math.PI - 1e-6);
  const [line, rings] = circle(photo.latitude * RAD, photo.longitude * RAD, r);
  const xs = rings[0].map((p) => p[0]), reach = Math.max(...xs) - Math.min(...xs);
  if (reach * view.scale < 6) return;
  const whole = size()[0] / view.scale > 0.9;
  for (const shift of whole ? [-1, 0, 1] : copies(Math.min(...xs), Math.max(...xs))) {
    const draw = (ring) => "M" + ring.map(([x, y]) => `${px(x + shift).toFixed(1)},${py(y).toFixed(1)}`).join("L");
    node(parent, "path", { d: rings.map((ring) => draw(ring) + "Z").join(""), class: "radius" });
    node(parent, "path", { d: draw(line), class: "radius-line" });
  }
}
function drawPins(parent) {
  for (const candidate of [...photo.candidates].reverse()) {
    const x = worldX(candidate.longitude), y = py(worldY(candidate.latitude)), first = candidate.rank === 1 ? " first" : "";
    for (const shift of copies(x, x)) {
      const pin = node(parent, "g", {});
      node(pin, "circle", { cx: px(x + shift), cy: y, r: 10, class: "pin" + first });
      node(pin, "text", { x: px(x + shift), y: y + 4.3, class: "pin-rank" + first }, candidate.rank);
      node(pin, "title", {}, `candidate ${candidate.rank}: ${degrees(candidate.latitude, candidate.longitude)}`);
    }
  }
}
function drawMini(w, h, whole) {
  const mini = byId("mini");
  mini.style.display = whole ? "none" : "";
  if (whole) return;
  mini.replaceChildren();
  if (data.images.length) node(mini, "image", { href: data.images[0].src, width: 100, height: 100, preserveAspectRatio: "none" });
  for (const tile of stages[step].beam) {
    const [x0, y0, x1] = box(tile), side = Math.max(4, 100 * (x1 - x0)), middle = 50 * (x1 - x0);
    node(mini, "rect", { x: 100 * x0 + middle - side / 2, y: 100 * y0 + middle - side / 2, width: side, height: side,
      class: "tile", style: "stroke:#000;stroke-width:.7" });
  }
  const wide = Math.max(6, (100 * w) / view.scale), high = Math.max(6, (100 * h) / view.scale);
  const x = (((view.x % 1) + 1) % 1) * 100, y = view.y * 100;
  node(mini, "rect", { x: x - wide / 2, y: y - high / 2, width: wide, height: high, class: "view" });
}
function drawScale() {
  const perPixel = (EQUATOR_KM * Math.cos(latitude(Math.max(0, Math.min(1, view.y))) * RAD)) / view.scale;
  const most = perPixel * 120, power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((m) => m * power).find((m) => m <= most);
  byId("scale").firstElementChild.textContent = length < 1 ? `${Math.round(length * 1000)} m` : `${length.toLocaleString("en")} km`;
  byId("scale").lastElementChild.style.width = `${length / perPixel}px`;
}

// --- the panel ---
function showStatus() {
  if (!photo.levels.length) {
    byId("status").textContent = `No map tiles were searched. Candidate ${chosen.rank} is a point of GeoCLIP's gallery.`;
    return;
  }
  const level = stages[step], best = level.beam.findIndex((t) => key(t) === key(stage(step))) + 1;
  byId("status").textContent = `Level ${step + 1} of ${stages.length}, zoom ${level.zoom}: ` +
    `${level.candidates.toLocaleString("en")} tiles scored${level.exhaustive ? " (all there are, from an index)" : ""}, ` +
    `${level.beam.length} kept. ` + (level.late ? `${level.late} came too late. ` : "") +
    (level.enlarged ? `${level.enlarged} were enlarged from coarser ones. ` : "") +
    `Candidate ${chosen.rank} lies in ${best ? `the tile ranked ${best}` : "a tile that was not kept"}.`;
  [...byId("levels").children].forEach((row, i) => row.classList.toggle("now", i === step));
}
function goTo(i, animate = true) {
  step = Math.max(0, Math.min(stages.length - 1, i));
  byId("step").value = step;
  byId("step").setAttribute("aria-valuetext", `zoom ${stages[step].zoom}`);
  byId("back").disabled = step === 0;
  byId("next").disabled = step === stages.length - 1;
  showStatus();
  if (animate) glide(target(step)); else { cancelAnimationFrame(frame); view = target(step); draw(); }
}
function stop() { clearInterval(timer); timer = 0; byId("play").textContent = "Play"; }
function play() {
  if (timer) return stop();
  if (step === stages.length - 1) goTo(0);
  byId("play").textContent = "Stop";
  timer = setInterval(() => { if (step === stages.length - 1) stop(); else goTo(step + 1); }, 1500);
}
function choose(candidate) {
  chosen = candidate;
  [...byId("candidates").children].forEach((item) =>
    item.firstElementChild.setAttribute("aria-pressed", Number(item.dataset.rank) === candidate.rank));
}
function showPhoto(i) {
  photo = data.photos[i];
  stages = photo.levels.length ? photo.levels : withoutLevels();
  for (const id of ["legend", "levels-card"]) byId(id).hidden = !photo.levels.length;
  byId("shares").textContent = photo.levels.length ? "share of the last beam" : "share of the gallery";
  byId("title").textContent = `Where ${photo.photo} may have been taken`;
  byId("banner").hidden = photo.world !== "planet";
  byId("note").textContent = photo.note;
  byId("credit").textContent = photo.attribution || (photo.tiles && `tiles: ${photo.tiles}`);
  byId("credit").hidden = !byId("credit").textContent;
  byId("point").firstElementChild.textContent = degrees(photo.latitude, photo.longitude);
  const facts = byId("facts");
  facts.replaceChildren();
  const world = photo.world === "planet" ? "demo planet, not Earth" : "Earth";
  const rows = [["World", world], ["Uncertainty radius", `${km(photo.radius_km)} (${photo.radius_calibrated ? `holds ${Math.round(photo.radius_share * 100)} % of the truths` : "uncalibrated"})`], ["Score", photo.score.toFixed(3)],
    ...(photo.levels.length ? [["Beam width k", photo.k], ["Tiles", photo.tiles]] : []), ["Model", photo.model], ["Search", `${photo.seconds.toFixed(1)} s`]];
  if (photo.within) rows.splice(1, 0, ["Searched", photo.within]);
  if (photo.levels_left_out.length) rows.push(["Not searched", `zoom ${photo.levels_left_out.join(", ")}, which the tiles lack`]);
  if (photo.exif) rows.push(["GPS tag", photo.exif.distance_km === null ? "none" :
    `${km(photo.exif.distance_km)} away${photo.exif.meaningful ? "" : " (means nothing: not on Earth)"}`]);
  for (const [name, value] of rows) { node(facts, "dt", {}, name); node(facts, "dd", {}, value); }
  const list = byId("candidates");
  list.replaceChildren();
  for (const candidate of photo.candidates) {
    const item = node(list, "li", { "data-rank": candidate.rank }), button = node(item, "button", {});
    node(button, "b", {}, candidate.rank);
    node(button, "span", {}, degrees(candidate.latitude, candidate.longitude));
    node(button, "span", {}, percent(candidate.share));
    node(node(button, "span", { class: "bar" }), "i", { style: `width:${100 * candidate.share}%` });
    button.addEventListener("click", () => { choose(candidate); goTo(step); });
  }
  const rowsOfLevels = byId("levels");
  rowsOfLevels.replaceChildren();
  for (const level of photo.levels) {
    const row = node(rowsOfLevels, "tr", {});
    for (const cell of [level.zoom, level.candidates.toLocaleString("en"), level.beam.length, percent(level.coverage),
      level.beam[0].score.toFixed(3)]) node(row, "td", {}, cell);
  }
  byId("step").max = stages.length - 1;
  choose(photo.candidates[0]);
}

// --- events ---
byId("back").addEventListener("click", () => { stop(); goTo(step - 1); });
byId("next").addEventListener("click", () => { stop(); goTo(step + 1); });
byId("play").addEventListener("click", play);
byId("step").addEventListener("input", () => { stop(); goTo(Number(byId("step").value)); });
byId("photo").addEventListener("change", () => { stop(); showPhoto(Number(byId("photo").value)); goTo(Math.min(step, stages.length - 1)); });
byId("copy").addEventListener("click", async () => {
  const text = byId("point").firstElementChild;
  try { await navigator.clipboard.writeText(text.textContent); } catch {
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  byId("copy").textContent = "Copied";
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const act = { ArrowLeft: () => goTo(step - 1), ArrowRight: () => goTo(step + 1), Home: () => goTo(0),
    End: () => goTo(stages.length - 1), p: play }[event.key];
  if (act) { if (event.key !== "p") stop(); act(); event.preventDefault(); }
});
const pointers = new Map();
byId("map").addEventListener("pointerdown", (event) => {
  pointers.set(event.pointerId, event);
  event.currentTarget.setPointerCapture(event.pointerId);
  cancelAnimationFrame(frame);
});
byId("map").addEventListener("pointermove", (event) => {
  const last = pointers.get(event.pointerId);
  if (!last) return;
  const other = [...pointers.values()].find((p) => p.pointerId !== event.pointerId);
  if (other) {
    const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
    zoom(apart(event) / Math.max(1, apart(last)), other);
  } else {
    view.x -= (event.clientX - last.clientX) / view.scale;
    view.y = Math.max(0, Math.min(1, view.y - (event.clientY - last.clientY) / view.scale));
  }
  pointers.set(event.pointerId, event);
  draw();
});
for (const name of ["pointerup", "pointercancel"]) byId("map").addEventListener(name, (event) => pointers.delete(event.pointerId));
byId("map").addEventListener("wheel", (event) => {
  event.preventDefault();
  cancelAnimationFrame(frame);
  zoom(2 ** (-event.deltaY / 300), event);
  draw();
}, { passive: false });
function zoom(factor, at) {
  const frameBox = byId("map").getBoundingClientRect(), [w, h] = size();
  const dx = at.clientX - frameBox.left - w / 2, dy = at.clientY - frameBox.top - h / 2;
  const scale = Math.max(Math.min(w, h), Math.min(view.scale * factor, 2 ** 19 * 256));
  view = { x: view.x + dx / view.scale - dx / scale, y: view.y + dy / view.scale - dy / scale, scale };
}

// --- start: #photo=2&level=16 opens a given photo (from 1) at a given zoom ---
for (const image of data.images) node(byId("images"), "image", { href: image.src, preserveAspectRatio: "none" });
data.photos.forEach((p, i) => node(byId("photo"), "option", { value: i }, `${i + 1}. ${p.photo}`));
byId("map").classList.toggle("bare", data.images.length === 0);
byId("chooser").hidden = data.photos.length < 2;
const hash = new URLSearchParams(location.hash.slice(1));
const startPhoto = Math.max(0, Math.min(data.photos.length - 1, Number(hash.get("photo") || 1) - 1));
byId("photo").value = startPhoto;
showPhoto(startPhoto);
goTo(Math.max(0, stages.findIndex((level) => level.zoom === Number(hash.get("level")))), false);
new ResizeObserver(() => { cancelAnimationFrame(frame); view = target(step); draw(); }).observe(byId("frame"));
