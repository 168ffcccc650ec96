// The map: tiles of the server, the beams as they narrow, and the answer.

import { CircleMarker, DivIcon, FeatureGroup, LatLngBounds, Map as LeafletMap, Marker, Polygon, Rectangle, Circle, TileLayer }
  from "leaflet/dist/leaflet-src.esm.js";
import { tileUrl } from "./api.js";
import { degrees } from "./format.js";
import { ancestor, bounds, name } from "./tiles.js";

const PACE_MS = 650; // a level is shown for at least so long, so that eyes can follow
const SVG = "http://www.w3.org/2000/svg";
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const box = (tile) => {
  const { west, south, east, north } = bounds(tile);
  return new LatLngBounds([south, west], [north, east]);
};

// Tiles of a server that asks for a key: an <img> cannot send one.
const KeyTiles = TileLayer.extend({
  createTile(coords, done) {
    const image = document.createElement("img");
    image.alt = "";
    tileUrl(this.getTileUrl(coords), this.options.key).then((url) => {
      if (url) {
        image.onload = () => { URL.revokeObjectURL(url); done(null, image); };
        image.src = url;
      } else done(new Error("no tile"), image);
    });
    return image;
  },
});

export class SearchMap {
  #map; #layers = new FeatureGroup(); #levels = []; #queue = []; #timer = 0; #shown = -1; #world = "";

  constructor(element, overview) {
    this.overview = overview;
    this.#map = new LeafletMap(element, {
      zoomControl: true, worldCopyJump: true, minZoom: 1, maxZoom: 18, zoomSnap: 0.25, attributionControl: true,
    });
    this.#map.attributionControl.setPrefix(false);
    this.#layers.addTo(this.#map);
    this.#map.fitWorld({ animate: false });
    this.#map.on("zoomend", () => this.#markFar());
    new ResizeObserver(() => this.#map.invalidateSize()).observe(element);
  }

  // Puts the server's tiles under the search; `tiles` is that of /v1/about.
  setTiles(tiles, key) {
    if (!tiles.shown) return;
    // Small tiles are shown at half the usual side, one zoom deeper, so that they stay sharp; large ones the other way.
    const side = tiles.tile_size <= 128 ? 128 : tiles.tile_size >= 512 ? 512 : 256;
    const offset = { 128: 1, 256: 0, 512: -1 }[side];
    const options = {
      tileSize: side, zoomOffset: offset, minNativeZoom: Math.max(0, tiles.min_zoom - offset),
      maxNativeZoom: tiles.max_zoom - offset, maxZoom: 18, updateWhenZooming: false, key, attribution: escapeHtml(tiles.attribution),
    };
    const layer = (more) => {
      const all = { ...options, ...more };
      (key ? new KeyTiles(tiles.url, all) : new TileLayer(tiles.url, all)).addTo(this.#map);
    };
    // A few coarse tiles below the others, for as long as those have not come.
    layer({ maxNativeZoom: Math.max(options.minNativeZoom, Math.min(3 - offset, options.maxNativeZoom)), maxZoom: 9, attribution: "" });
    layer({});
    this.#world = tiles.min_zoom === 0 && !key ? tiles.url.replace("{z}", 0).replace("{x}", 0).replace("{y}", 0) : "";
  }

  // Puts the coasts of Earth under the search, where no tiles may be shown.
  async showCoasts() {
    const response = await fetch("/static/coasts.json");
    if (response.ok)
      new Polygon(await response.json(), { className: "land", interactive: false, attribution: "Natural Earth" }).addTo(this.#map).bringToBack();
  }

  clear() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#levels = [];
    this.#queue = [];
    this.#shown = -1;
    this.#layers.clearLayers();
    this.overview.toggleAttribute("hidden", true);
    this.#map.fitWorld({ animate: !calm.matches });
  }

  // Shows a level as soon as the ones before it have been seen.
  addLevel(level) {
    this.#levels.push(level);
    this.#enqueue(() => this.#showLevel(this.#levels.indexOf(level)));
  }

  // Shows a result with one of its candidates chosen, after the levels that wait.
  showResult(result, candidate) {
    this.#enqueue(() => {
      this.#levels = result.levels;
      this.showCandidate(result, candidate);
    });
  }

  showCandidate(result, candidate) {
    this.#skipQueue();
    this.#draw(result.levels.length - 1, candidate);
    const circle = this.#drawAnswer(result, candidate);
    // Far enough out that the radius can be seen around the best guess, and the tile around any other.
    const spot = box(candidate).pad(candidate.rank === 1 ? 1.5 : 4);
    if (candidate.rank === 1) spot.extend(circle.getBounds());
    this.#fly(spot, 16);
  }

  // Shows one level of a finished search.
  showStep(result, candidate, index) {
    this.#skipQueue();
    this.#draw(index, candidate);
    this.#drawAnswer(result, candidate);
    this.#fly(this.#view(index, candidate), 17);
  }

  #enqueue(step) {
    this.#queue.push(step);
    if (!this.#timer) this.#next();
  }

  #next() {
    const step = this.#queue.shift();
    this.#timer = step ? setTimeout(() => this.#next(), calm.matches ? 0 : PACE_MS) : 0;
    step?.();
  }

  #skipQueue() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#queue = [];
  }

  #showLevel(index) {
    const best = this.#levels[index].beam[0];
    this.#draw(index, best);
    this.#fly(this.#view(index, best), 17);
  }

  // The first level is the world; every other one is seen within the tile of the level before.
  #view(index, tile) {
    if (index === 0) return new LatLngBounds([-72, -178], [80, 178]);
    const before = this.#levels[index - 1].zoom;
    return box(before < tile.z ? ancestor(tile, before) : tile).pad(0.3);
  }

  #fly(target, maxZoom) {
    if (calm.matches) this.#map.fitBounds(target, { animate: false, maxZoom });
    else this.#map.flyToBounds(target, { duration: 0.55, maxZoom });
  }

  #draw(index, towards) {
    this.#shown = index;
    this.#layers.clearLayers();
    const level = this.#levels[index];
    if (!level) return;
    const rectangle = (tile, options) => new Rectangle(box(tile), { interactive: false, ...options }).addTo(this.#layers);
    if (index > 0) for (const tile of this.#levels[index - 1].beam) rectangle(tile, { className: "before", fill: false });
    for (const tile of level.beam) rectangle(tile, { className: "halo", fill: false });
    const scores = level.beam.map((tile) => tile.score), low = Math.min(...scores), high = Math.max(...scores);
    for (const tile of level.beam) {
      const strength = high > low ? (tile.score - low) / (high - low) : 1;
      rectangle(tile, { className: "kept", fillOpacity: 0.04 + 0.24 * strength });
      new CircleMarker(box(tile).getCenter(), { className: "kept dot", radius: 3, interactive: false }).addTo(this.#layers);
    }
    if (towards.z >= level.zoom) rectangle(ancestor(towards, level.zoom), { className: "path", fill: false });
    this.#drawOverview(level.beam);
    this.#markFar();
  }

  // From far away a deep tile is smaller than a pixel: a dot stands for it.
  #markFar() {
    const level = this.#levels[this.#shown];
    const side = level ? 256 * 2 ** (this.#map.getZoom() - level.zoom) : Infinity;
    this.#map.getContainer().classList.toggle("far", side < 12);
  }

  // Returns the circle of the radius.
  #drawAnswer(result, chosen) {
    const circle = new Circle([result.latitude, result.longitude], {
      className: "radius", radius: Math.min(result.radius_km, 5000) * 1000, interactive: false,
    }).addTo(this.#layers);
    for (const candidate of [...result.candidates].reverse()) {
      const icon = new DivIcon({
        className: candidate.rank === chosen.rank ? "pin chosen" : "pin", html: String(candidate.rank), iconSize: [24, 24],
      });
      const title = `Candidate ${candidate.rank}: ${degrees(candidate.latitude, candidate.longitude)}`;
      new Marker([candidate.latitude, candidate.longitude], {
        icon, title, alt: title, keyboard: false, interactive: false,
        zIndexOffset: candidate.rank === chosen.rank ? 1000 : -candidate.rank,
      }).addTo(this.#layers);
    }
    return circle;
  }

  // The whole world, small: where the beam is when the map shows a part of it.
  #drawOverview(beam) {
    const made = (element, attributes) => {
      const node = document.createElementNS(SVG, element);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      return node;
    };
    const parts = this.#world ? [made("image", { href: this.#world, width: 100, height: 100 })] : [];
    for (const { z, x, y } of beam) {
      const side = 100 / 2 ** z, grown = Math.max(3, side);
      parts.push(made("rect", {
        x: (x + 0.5) * side - grown / 2, y: (y + 0.5) * side - grown / 2, width: grown, height: grown,
        "data-tile": name({ z, x, y }),
      }));
    }
    this.overview.replaceChildren(...parts);
    this.overview.toggleAttribute("hidden", beam[0].z <= 4);
  }
}

function escapeHtml(text) {
  const element = document.createElement("span");
  element.textContent = text;
  return element.innerHTML;
}
