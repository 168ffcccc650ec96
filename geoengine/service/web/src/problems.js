// What is said when something goes wrong: a heading, a sentence, and whether another try can help.

import { megabytes } from "./format.js";

const TITLES = {
  401: "The server asks for a key",
  403: "The server refuses this page",
  408: "The photo came too slowly",
  413: "This photo is too large",
  415: "This is not a photo that can be read",
  422: "This cannot be searched",
  429: "Too many searches",
  500: "The server has a fault",
  503: "The server is busy or not well",
};

export function described(problem, levelsSeen) {
  if (problem.kind === "gone")
    return {
      title: "The server does not answer",
      text: "It may have been stopped, or the network is down. Your photo is still here: try again in a moment.",
      again: true,
    };
  if (problem.kind === "cut")
    return {
      title: "The connection broke off",
      text: levelsSeen
        ? `The search got as far as level ${levelsSeen}, which is what you see. Your photo is still here: try again.`
        : "No level had been searched. Your photo is still here: try again.",
      again: true,
    };
  const title = TITLES[problem.kind] ?? "The search failed";
  const text = sentence(problem.message) || `The server answered with status ${problem.kind}.`;
  return { title, text, again: [408, 429, 500, 502, 503, 504].includes(problem.kind) };
}

// What can be told before anything is sent; null when the file may be tried.
export function refusal(file, limits) {
  const isPicture = file.type.startsWith("image/") || !file.type;
  if (!isPicture) return { title: TITLES[415], text: `“${file.name}” is not a picture. Choose a JPEG, PNG, WebP, TIFF, AVIF or HEIC file.` };
  if (!file.size) return { title: TITLES[415], text: `“${file.name}” is empty.` };
  if (limits && file.size > limits.max_bytes)
    return { title: TITLES[413], text: `It has ${megabytes(file.size)}, and this server takes ${megabytes(limits.max_bytes)}. Save it smaller: 1000 pixels a side are plenty.` };
  return null;
}

function sentence(text) {
  if (!text) return "";
  const capital = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
