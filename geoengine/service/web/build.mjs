// Builds the page into ../static: `npm ci && npm run build`, or `make page`. What it writes is committed, so that
// installing the package needs no Node; build.json there holds the hashes that a test compares.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { build } from "esbuild";
import { feature } from "topojson-client";

const SOURCE = "src", OUT = "../static", USE = "../../../RESPONSIBLE_USE.md";
const sha256 = (data) => createHash("sha256").update(data).digest("hex");
const text = (file) => readFileSync(file, "utf8");
const filesBelow = (folder) =>
  readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort();

const escaped = (line) => line.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const inline = (line) =>
  escaped(line).replace(/\*\*(.+?)\*\*/g, "<strong>$1</strong>").replace(/`(.+?)`/g, "<code>$1</code>");

// The Markdown that RESPONSIBLE_USE.md is written in: headings, paragraphs, lists, bold and code.
function htmlOf(markdown) {
  return markdown.trim().split(/\n\n+/).map((block) => {
    const heading = /^(#+) (.*)$/.exec(block);
    if (heading) return `<h${heading[1].length}>${inline(heading[2])}</h${heading[1].length}>`;
    const joined = block.replace(/\n\s*(?!- )/g, " ");
    if (!block.startsWith("- ")) return `<p>${inline(joined)}</p>`;
    return `<ul>\n${joined.split("\n").map((item) => `<li>${inline(item.slice(2))}</li>`).join("\n")}\n</ul>`;
  }).join("\n");
}

// The coasts of Earth (Natural Earth, public domain), for servers whose map may not be shown: rings of [lat, lng].
function coasts() {
  const atlas = JSON.parse(text("node_modules/world-atlas/land-110m.json"));
  const round = (degrees) => Math.round(100 * degrees) / 100;
  // A ring that crosses 180 degrees goes on beyond it, instead of running back across the map.
  const unwrapped = (ring) => {
    let turns = 0;
    return ring.map(([lng, lat], i) => {
      const step = i ? lng - ring[i - 1][0] : 0;
      turns += step < -180 ? 1 : step > 180 ? -1 : 0;
      return [round(lat), round(lng + 360 * turns)];
    });
  };
  const shifted = (polygon, degrees) => polygon.map((ring) => ring.map(([lat, lng]) => [lat, round(lng + degrees)]));
  const polygons = feature(atlas, atlas.objects.land).features
    .flatMap(({ geometry }) => geometry.coordinates.map((polygon) => polygon.map(unwrapped)));
  const beyond = (sign) => polygons.filter(([ring]) => ring.some(([, lng]) => sign * lng > 180));
  return [...polygons, ...beyond(1).map((p) => shifted(p, -360)), ...beyond(-1).map((p) => shifted(p, 360))];
}

rmSync(OUT, { recursive: true, force: true });
mkdirSync(join(OUT, "samples"), { recursive: true });
const built = await build({
  entryPoints: [`${SOURCE}/main.js`, `${SOURCE}/style.css`],
  entryNames: "[name]-[hash]",
  outdir: OUT,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["chrome109", "firefox115", "safari16"],
  legalComments: "eof",
  external: ["*.png"], // Leaflet's own markers and layer icons, which the page does not use
  metafile: true,
});
const names = Object.keys(built.metafile.outputs).map((file) => basename(file));
const named = (start) => names.find((name) => name.startsWith(start));
const filled = (page) =>
  page.replaceAll("__SCRIPT__", `/static/${named("main")}`).replaceAll("__STYLE__", `/static/${named("style")}`);
writeFileSync(join(OUT, "index.html"), filled(text(`${SOURCE}/index.html`)));
const use = text(`${SOURCE}/responsible-use.html`).replace("__TEXT__", () => htmlOf(text(USE)));
writeFileSync(join(OUT, "responsible-use.html"), filled(use));
cpSync("node_modules/leaflet/LICENSE", join(OUT, "leaflet-LICENSE.txt"));
for (const file of ["icon.svg", "samples"]) cpSync(join(SOURCE, file), join(OUT, file), { recursive: true });

writeFileSync(join(OUT, "coasts.json"), JSON.stringify(coasts()));

// The same sums as in tests/test_page_build.py.
const sources = ["build.mjs", "package-lock.json", "package.json", USE, ...filesBelow(SOURCE)];
const sums = Object.fromEntries(filesBelow(OUT).map((file) => [file.slice(OUT.length + 1), sha256(readFileSync(file))]));
const source = sha256(sources.map((file) => sha256(readFileSync(file))).join("\n"));
writeFileSync(join(OUT, "build.json"), JSON.stringify({ source, files: sums }, null, 1) + "\n");
