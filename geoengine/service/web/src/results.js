// What the panel says of a result: the best guess, the candidates, the path.

import { degrees, km, percent, count } from "./format.js";
import { ancestor, distanceKm, name } from "./tiles.js";

const byId = (id) => document.getElementById(id);

export function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function showBest(result) {
  byId("point").textContent = degrees(result.latitude, result.longitude);
  byId("radius").textContent = `Radius: ${km(result.radius_km)}. ${searched(result)}`;
  byId("warnings").replaceChildren(...warnings(result).map((text) => element("li", {}, text)));
  const share = percent(result.radius_share);
  byId("radius-meaning").textContent = result.radius_calibrated
    ? `The radius is calibrated: of the photos that these encoders were tried on, ${share} lay within theirs.`
    : result.levels.length
      ? `The radius holds ${share} of what the last level kept. It is not calibrated: if an early level dropped the true ` +
        "place, the answer is far off and the radius does not show it."
      : `The radius holds ${share} of what GeoCLIP takes for likely. It is not calibrated: the true place may be far off, ` +
        "and the radius does not show it.";
}

export function showCandidates(result, chosen, choose) {
  const best = result.candidates[0];
  byId("candidates").replaceChildren(...result.candidates.map((candidate) => {
    const away = candidate === best ? `radius ${km(result.radius_km)}` : `${km(distanceKm(best, candidate))} from the first`;
    const button = element("button", { type: "button", "aria-pressed": String(candidate === chosen) },
      element("span", { class: "rank" }, `${candidate.rank}`),
      element("span", { class: "where" }, degrees(candidate.latitude, candidate.longitude, 4)),
      element("span", { class: "share" }, percent(candidate.share)),
      element("meter", { min: 0, max: 1, value: candidate.share, "aria-hidden": "true" }),
      element("span", { class: "away" }, away));
    button.setAttribute("aria-label", `Candidate ${candidate.rank}: ${degrees(candidate.latitude, candidate.longitude)}, ` +
      `share ${percent(candidate.share)}, ${away}. Show on the map`);
    button.addEventListener("click", () => choose(candidate));
    return element("li", {}, button);
  }));
}

// A level's row: while a search runs it has no path yet.
export function levelRow(level, candidate, show, scoring) {
  const rank = candidate ? level.beam.findIndex((tile) => name(tile) === name(ancestor(candidate, level.zoom))) : -1;
  const scored = candidate?.path.find((tile) => tile.z === level.zoom);
  const zoom = show
    ? element("button", { type: "button", "aria-label": `Zoom ${level.zoom}: show on the map` }, `${level.zoom}`)
    : `${level.zoom}`;
  if (show) zoom.addEventListener("click", show);
  return element("tr", {},
    element("th", { scope: "row" }, zoom),
    element("td", {}, level.candidates.toLocaleString("en")),
    element("td", {}, level.beam.length.toLocaleString("en")),
    element("td", {}, rank >= 0 ? `${rank + 1}` : candidate ? "not kept" : "…"),
    element("td", {}, scored ? score(scored, scoring) : candidate ? "–" : "…"));
}

// Path scores are natural logarithms of probabilities, the paper's are cosines.
const score = (tile, scoring) => (scoring?.score === "path" ? percent(Math.exp(tile.score)) : tile.score.toFixed(3));

export function levelSentence(level, number, levels) {
  const lacking = level.coverage < 1 ? ` ${percent(level.coverage)} of its tiles were there.` : "";
  return `Level ${number} of ${levels}, zoom ${level.zoom}: ${count(level.candidates, "tile")} compared, ` +
    `${level.beam.length} kept.${lacking}`;
}

// GeoCLIP alone searches no map: its results have no levels.
function searched({ levels }) {
  if (!levels.length) return "GeoCLIP’s list of places was compared, and no map tile.";
  const tiles = levels.reduce((sum, level) => sum + level.candidates, 0);
  return `Zooms ${levels[0].zoom} to ${levels.at(-1).zoom}, ${count(tiles, "tile")} compared.`;
}

function warnings(result) {
  const poor = result.levels.filter((level) => level.coverage < 0.95);
  const said = poor.map((level) => `At zoom ${level.zoom} only ${percent(level.coverage)} of the tiles ` +
    `${level.late ? "came in time" : "were there"}: the true place may be among the others.`);
  if (result.levels_left_out.length)
    said.push(`The map has no zoom ${result.levels_left_out.join(", ")}: the answer is coarser than it could be.`);
  if (result.within) said.push(`Only ${result.within} was searched.`);
  return said;
}
