// Builds the page into ../static: `npm ci && npm run build`, or `make page`. What it writes is committed, so that
// installing the package needs no Node; build.json there holds the hashes that a test compares.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { build } from "esbuild";

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
for (const file of ["icon.svg", "samples"]) cpSync(join(SOURCE, file), join(OUT, file), { recursive: true });

// The same sums as in tests/test_page_build.py.
const sources = ["build.mjs", "package-lock.json", "package.json", USE, ...filesBelow(SOURCE)];
const sums = Object.fromEntries(filesBelow(OUT).map((file) => [file.slice(OUT.length + 1), sha256(readFileSync(file))]));
const source = sha256(sources.map((file) => sha256(readFileSync(file))).join("\n"));
writeFileSync(join(OUT, "build.json"), JSON.stringify({ source, files: sums }, null, 1) + "\n");
