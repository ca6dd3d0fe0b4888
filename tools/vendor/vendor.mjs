// Makes the browser libraries of the studio from their npm packages, and lists them with their digests.
//
//     cd tools/vendor && npm install && node vendor.mjs
//
// Needs Node and the network, and runs only when a version in package.json changes. The studio itself has no build step.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "../../src/t2i_adapter/studio/web/vendor");
const packages = ["preact", "@preact/signals", "@preact/signals-core", "htm", "uplot"];
const modules = {
  "ui.js": `
    export { h, render, Fragment, createRef } from "preact";
    export { useEffect, useLayoutEffect, useMemo, useRef, useState, useCallback, useId } from "preact/hooks";
    export { signal, computed, effect, batch, untracked, useSignal, useComputed, useSignalEffect } from "@preact/signals";
    import { h } from "preact";
    import htm from "htm";
    export const html = htm.bind(h);`,
  "uplot.js": `export { default } from "uplot";`,
};

const read = (name, file) => readFileSync(join(here, "node_modules", name, file), "utf8");
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

mkdirSync(out, { recursive: true });
for (const [name, contents] of Object.entries(modules)) {
  await build({
    stdin: { contents, resolveDir: here },
    bundle: true,
    format: "esm",
    minify: true,
    target: "es2022",
    legalComments: "none",
    outfile: join(out, name),
  });
}
writeFileSync(join(out, "uplot.css"), read("uplot", "dist/uPlot.min.css"));
writeFileSync(
  join(out, "LICENSES"),
  packages.map((name) => `${name}\n${"=".repeat(name.length)}\n\n${read(name, "LICENSE").trim()}\n`).join("\n\n"),
);
const listed = packages.map((name) => {
  const { version, license } = JSON.parse(read(name, "package.json"));
  return { name, version, license };
});
const files = [...Object.keys(modules), "uplot.css", "LICENSES"];
const digests = Object.fromEntries(files.map((name) => [name, sha256(readFileSync(join(out, name)))]));
writeFileSync(join(out, "vendor.json"), `${JSON.stringify({ packages: listed, sha256: digests }, null, 2)}\n`);
