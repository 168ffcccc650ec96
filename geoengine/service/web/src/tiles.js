// Map tiles { z, x, y } in XYZ addressing, in degrees.

const latitude = (y, n) => (Math.atan(Math.sinh(Math.PI * (1 - (2 * y) / n))) * 180) / Math.PI;

export function bounds({ z, x, y }) {
  const n = 2 ** z;
  return { west: (x / n) * 360 - 180, south: latitude(y + 1, n), east: ((x + 1) / n) * 360 - 180, north: latitude(y, n) };
}

export const name = ({ z, x, y }) => `${z}/${x}/${y}`;

// The tile that another one lies in, at a coarser zoom.
export function ancestor({ z, x, y }, zoom) {
  const side = 2 ** (z - zoom);
  return { z: zoom, x: Math.floor(x / side), y: Math.floor(y / side) };
}

const EARTH_KM = 6371.0088;

export function distanceKm(a, b) {
  const rad = Math.PI / 180, dLat = (b.latitude - a.latitude) * rad, dLng = (b.longitude - a.longitude) * rad;
  const h = Math.sin(dLat / 2) ** 2 + Math.cos(a.latitude * rad) * Math.cos(b.latitude * rad) * Math.sin(dLng / 2) ** 2;
  return 2 * EARTH_KM * Math.asin(Math.min(1, Math.sqrt(h)));
}
