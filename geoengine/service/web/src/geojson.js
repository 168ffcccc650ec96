// A result as GeoJSON, feature by feature as `geoengine locate --geojson` writes it; a test compares the two.

import { bounds, name } from "./tiles.js";

const DIGITS = 1e7;
const round = (degrees) => Math.round(degrees * DIGITS) / DIGITS;

function ring(tile) {
  const { west, south, east, north } = bounds(tile);
  return [[west, south], [east, south], [east, north], [west, north], [west, south]].map((p) => p.map(round));
}

export function featureCollection(result) {
  const common = (kind) => ({ photo: result.photo, world: result.world, kind });
  const candidates = result.candidates.map((candidate) => ({
    type: "Feature",
    geometry: { type: "Point", coordinates: [candidate.longitude, candidate.latitude] },
    properties: {
      ...common("candidate"),
      rank: candidate.rank, score: candidate.score, share: candidate.share, tile: name(candidate),
      within: result.within, tiles: result.tiles, attribution: result.attribution, model: result.model,
      ...(candidate.rank === 1 ? { radius_km: result.radius_km } : {}),
    },
  }));
  const beams = result.levels.flatMap((level) => level.beam.map((tile, i) => ({
    type: "Feature",
    geometry: { type: "Polygon", coordinates: [ring(tile)] },
    properties: { ...common("beam"), zoom: level.zoom, rank: i + 1, score: tile.score, tile: name(tile) },
  })));
  return { type: "FeatureCollection", note: result.note, features: [...candidates, ...beams] };
}
