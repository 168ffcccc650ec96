// Numbers as people read them.

export function degrees(latitude, longitude, digits = 5) {
  const side = (value, plus, minus) => `${Math.abs(value).toFixed(digits)}° ${value < 0 ? minus : plus}`;
  return `${side(latitude, "N", "S")}, ${side(longitude, "E", "W")}`;
}

export function km(value) {
  if (value < 1) return `${Math.max(1, Math.round(value * 1000))} m`;
  return value < 100 ? `${value.toFixed(1)} km` : `${Math.round(value).toLocaleString("en")} km`;
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "under 0.1 %";
  return `${(100 * share).toFixed(share > 0.999 && share < 1 ? 2 : 1)} %`;
}

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 2 ** 20 * 10 ? 1 : 0)} MB`;
