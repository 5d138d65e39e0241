// Renders chosen icons on white: node render_task.mjs SIDE < '[["ph", "cat-fill"], ...]' > RGBA bytes, one icon after another
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(import.meta.url);
const { Resvg } = require("@resvg/resvg-js");
const side = Number(process.argv[2]);

for (const [prefix, name] of JSON.parse(readFileSync(0, "utf8"))) {
  const set = require(`@iconify/json/json/${prefix}.json`);
  const icon = set.icons[name];
  const [left, top] = [icon.left ?? set.left ?? 0, icon.top ?? set.top ?? 0];
  const [width, height] = [icon.width ?? set.width ?? 16, icon.height ?? set.height ?? 16];
  const square = Math.max(width, height);
  const box = [left - (square - width) / 2, top - (square - height) / 2, square, square].join(" ");
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="${side}" height="${side}" viewBox="${box}" color="#000">${icon.body}</svg>`;
  const { pixels } = new Resvg(svg, { background: "white", fitTo: { mode: "original" } }).render();
  for (let sent = 0; sent < pixels.length; ) sent += writeSync(1, pixels, sent);
}
