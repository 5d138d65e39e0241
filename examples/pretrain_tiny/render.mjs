// Renders every permissively licensed icon at 64 px: node render.mjs OUT [PROCESSES]
//
// OUT/<set>.bin    one picture after another, uint8: alpha alone (64x64) for one-colour sets, RGBA (64x64x4) otherwise
// OUT/<set>.json   {"prefix", "channels", "names", "author", "licence", "link", "skipped"}
//
// A few icons abort the whole renderer process (a Rust panic that JavaScript cannot catch). So each set is rendered by
// a child process that reports every finished picture; when a child dies, the next icon is the culprit: it is listed
// under "skipped" and a new child goes on behind it.
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, openSync, readFileSync, renameSync, rmSync, statSync, truncateSync, writeFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import path from "node:path";

const require = createRequire(import.meta.url);
const here = path.dirname(fileURLToPath(import.meta.url));
const config = JSON.parse(readFileSync(path.join(here, "sets.json"), "utf8"));
const SIZE = 64;

function iconsOf(prefix) {
  const set = require(`@iconify/json/json/${prefix}.json`);
  const names = Object.keys(set.icons).filter((name) => !set.icons[name].hidden);
  return { set, names };
}

function svgOf(set, name) {
  const icon = set.icons[name];
  const [left, top] = [icon.left ?? set.left ?? 0, icon.top ?? set.top ?? 0];
  const [width, height] = [icon.width ?? set.width ?? 16, icon.height ?? set.height ?? 16];
  const side = Math.max(width, height); // square, the drawing in its middle
  const box = [left - (side - width) / 2, top - (side - height) / 2, side, side].join(" ");
  return `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="${SIZE}" height="${SIZE}" viewBox="${box}" color="#000">${icon.body}</svg>`;
}

function alphaOf(rgba) {
  const alpha = Buffer.allocUnsafe(rgba.length / 4);
  for (let i = 0; i < alpha.length; i++) alpha[i] = rgba[4 * i + 3];
  return alpha;
}

function renderChild(prefix, channels, first, out) {
  const { Resvg } = require("@resvg/resvg-js");
  const { set, names } = iconsOf(prefix);
  const file = openSync(path.join(out, `${prefix}.part`), "a");
  for (let i = first; i < names.length; i++) {
    const { pixels } = new Resvg(svgOf(set, names[i]), { fitTo: { mode: "original" } }).render();
    writeSync(file, channels === 4 ? pixels : alphaOf(pixels));
  }
}

async function renderSet(prefix, info, out) {
  const target = path.join(out, `${prefix}.json`);
  if (existsSync(target)) return; // an earlier run finished it
  const channels = info.palette ? 4 : 1;
  const { names } = iconsOf(prefix);
  const part = path.join(out, `${prefix}.part`);
  rmSync(part, { force: true });
  writeFileSync(part, "");
  const skipped = new Set();
  let done = 0; // icons dealt with, rendered or skipped
  while (done < names.length) {
    const args = [fileURLToPath(import.meta.url), "--child", prefix, channels, done, out];
    const code = await new Promise((resolve) => spawn(process.execPath, args, { stdio: "ignore" }).on("close", resolve));
    const bytes = SIZE * SIZE * channels;
    const rendered = Math.floor(statSync(part).size / bytes);
    truncateSync(part, rendered * bytes);
    done = rendered + skipped.size;
    if (code === 0 && done >= names.length) break;
    if (done < names.length) skipped.add(names[done++]);
  }
  renameSync(part, path.join(out, `${prefix}.bin`));
  const { author, license, name, version } = info;
  const record = { prefix, name, version, channels, author, licence: license, skipped: [...skipped], names: names.filter((n) => !skipped.has(n)) };
  writeFileSync(target, JSON.stringify(record));
  console.error(`${prefix}: ${record.names.length} rendered, ${skipped.size} skipped`);
}

async function main(out, processes) {
  mkdirSync(out, { recursive: true });
  const collections = require("@iconify/json/collections.json");
  const leftOut = new Set(Object.values(config.left_out).flat());
  const queue = Object.entries(collections)
    .filter(([prefix, info]) => config.licences.includes(info.license.spdx) && !leftOut.has(prefix))
    .sort((a, b) => b[1].total - a[1].total);
  const worker = async () => {
    for (let next; (next = queue.shift()); ) await renderSet(...next, out);
  };
  await Promise.all(Array.from({ length: processes }, worker));
}

if (process.argv[2] === "--child") {
  const [prefix, channels, first, out] = process.argv.slice(3);
  renderChild(prefix, Number(channels), Number(first), out);
} else {
  if (!process.argv[2]) throw new Error("usage: node render.mjs OUT [PROCESSES]");
  await main(process.argv[2], Number(process.argv[3] ?? 2));
}
