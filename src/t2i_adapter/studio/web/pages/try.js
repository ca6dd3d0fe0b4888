// @ts-check
// Try: draw a condition, or take one from a photo, and see what the adapter makes of it.
import { html, useEffect, useRef, useState } from "../vendor/ui.js";
import { get, post, putPicture } from "../api.js";
import { Drawing, TOOLS } from "../canvas.js";
import { Command, Empty, Field, Loading, Notice, Problem, Progress, canWrite, useAction, useGet } from "../kit.js";
import { on } from "../live.js";
import { go } from "../router.js";
import { number } from "../words.js";

const STRIPS = { one: "", strengths: "scale=0,0.5,1,1.5", seeds: "seeds" };
const DARK = ["white on black", "near is white"];
const RATIOS = [1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16];

/** Colours to draw with, and the ground, by what the adapter was trained on. @param {any} adapter */
function colours(adapter) {
  const { kind, polarity } = adapter.condition;
  const own = adapter.palette ?? [];
  if (kind === "labels" || kind === "pose" || kind === "normal") return { ground: own[0] ?? "#000000", palette: own.length ? own : ["#ffffff", "#000000"] };
  if (polarity === "black on white") return { ground: "#ffffff", palette: ["#000000", "#ffffff"] };
  if (DARK.includes(polarity)) return { ground: "#000000", palette: ["#ffffff", "#808080", "#000000"] };
  const isDark = !own.length || parseInt(own[0].slice(1, 3), 16) + parseInt(own[0].slice(3, 5), 16) + parseInt(own[0].slice(5, 7), 16) < 384;
  return { ground: own[0] ?? "#000000", palette: [...new Set([isDark ? "#ffffff" : "#000000", ...own])].slice(0, 24) };
}

/** [width, height] of about the area of a square, both multiples of what a base needs. @param {number} side @param {number} ratio width / height */
function sized(side, ratio) {
  const step = side >= 512 ? 64 : 32;
  const near = (/** @type {number} */ pixels) => Math.max(step, Math.round(pixels / step) * step);
  return ratio === 1 ? [side, side] : [near(side * Math.sqrt(ratio)), near(side / Math.sqrt(ratio))];
}

/** @param {{adapter: any, drawing: any, area: number[], onArea: (area: number[]) => void, onPhoto: (file: File) => void, onMap: (file: File) => void}} props */
function Board({ adapter, drawing, area, onArea, onPhoto, onMap }) {
  const { ground, palette } = colours(adapter);
  const side = adapter.resolution ?? 512;
  const areas = [...new Map(RATIOS.map((ratio) => sized(side, ratio)).map((one) => [one.join(), one])).values()];
  const canvas = useRef(/** @type {any} */ (null));
  const [tool, setTool] = useState("brush");
  const [colour, setColour] = useState(palette[0] === ground ? (palette[1] ?? "#ffffff") : palette[0]);
  const [width, setWidth] = useState(Math.max(2, Math.round(side / 64)));
  const [, setChange] = useState(0);
  useEffect(() => {
    const settings = { tool, colour, size: width, ground, isSharp: ["labels", "pose"].includes(adapter.condition.kind), onChange: () => setChange((n) => n + 1), onPick: setColour };
    drawing.current = new Drawing(canvas.current, settings);
    drawing.current.clear();
    drawing.current.before = [];
  }, [adapter.id, area.join()]);
  if (drawing.current) Object.assign(drawing.current.settings, { tool, colour, size: width });
  const keys = (/** @type {KeyboardEvent} */ event) => {
    const isTyping = ["INPUT", "TEXTAREA", "SELECT"].includes(/** @type {any} */ (event.target).tagName);
    if (isTyping) return;
    const found = TOOLS.find(([, , key]) => key === event.key);
    if (found && !event.ctrlKey && !event.metaKey) setTool(found[0]);
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") {
      event.preventDefault();
      event.shiftKey ? drawing.current?.redo() : drawing.current?.undo();
    }
    if (event.key === "[") setWidth((n) => Math.max(1, n - 1));
    if (event.key === "]") setWidth((n) => Math.min(128, n + 1));
  };
  useEffect(() => {
    addEventListener("keydown", keys);
    return () => removeEventListener("keydown", keys);
  }, []);
  const file = (/** @type {(file: File) => void} */ take) => (/** @type {any} */ event) => {
    if (event.target.files[0]) take(event.target.files[0]);
    event.target.value = "";
  };
  return html`<section class="panel" aria-label="Condition">
    <div class="row" role="toolbar" aria-label="Tools">
      ${TOOLS.map(([name, label, key]) => html`<button type="button" aria-pressed=${tool === name} title=${`Key ${key}`} onClick=${() => setTool(name)}>${label}</button>`)}
      <button type="button" title="Ctrl+Z" onClick=${() => drawing.current.undo()}>Undo</button>
      <button type="button" title="Ctrl+Shift+Z" onClick=${() => drawing.current.redo()}>Redo</button>
      <button type="button" onClick=${() => drawing.current.clear()}>Clear</button>
    </div>
    <div class="row small">
      <label>Width <input type="range" min="1" max="64" value=${width} title="Keys [ and ]" onInput=${(/** @type {any} */ event) => setWidth(+event.target.value)} /> ${width} px</label>
      <span class="row swatches" role="group" aria-label="Colours">${palette.map((/** @type {number[]} */ one) => html`<button type="button" class="swatch" aria-label=${`Colour ${one}`} aria-pressed=${one === colour} style=${{ background: one }} onClick=${() => setColour(one)}></button>`)}</span>
      <label>Size <select value=${area.join()} onChange=${(/** @type {any} */ event) => onArea(event.target.value.split(",").map(Number))}>${areas.map((/** @type {number[]} */ one) => html`<option value=${one.join()}>${one[0]} × ${one[1]}</option>`)}</select></label>
      <label>Other <input type="color" value=${colour} onInput=${(/** @type {any} */ event) => setColour(event.target.value)} /></label>
    </div>
    <canvas key=${area.join()} ref=${canvas} class="board" width=${area[0]} height=${area[1]} style=${{ aspectRatio: `${area[0]} / ${area[1]}` }} tabindex="0" role="img" aria-label=${`Drawing of the condition, ${area[0]} by ${area[1]} pixels. It can be replaced by a picture below.`}></canvas>
    <div class="row small">
      <label class="button">Send a map<input type="file" accept="image/png,image/jpeg,image/webp" class="hidden-file" onChange=${file(onMap)} /></label>
      <label class="button">Make it from a photo<input type="file" accept="image/png,image/jpeg,image/webp" class="hidden-file" onChange=${file(onPhoto)} /></label>
    </div>
    <p class="help">Drawing needs a mouse, a pen or a finger. With a keyboard, send a map or a photo instead. Keys: ${TOOLS.map(([, label, key]) => `${key} ${label.toLowerCase()}`).join(", ")}, [ and ] width.</p>
  </section>`;
}

/** @param {{paint: any, progress: any, onCancel: () => void}} props */
function Result({ paint, progress, onCancel }) {
  if (!paint) return html`<${Notice}><p>The picture appears here. Ctrl+Enter asks for it.</p></${Notice}>`;
  if (paint.state === "running") {
    return html`<section class="panel" aria-live="polite">
      <${Progress} label=${progress.text ?? "waiting"} done=${progress.done ?? 0} total=${progress.total ?? null} />
      <button type="button" onClick=${onCancel}>Cancel</button></section>`;
  }
  if (paint.state !== "done") return html`<${Notice} kind=${paint.state === "cancelled" ? "calm" : "bad"}><p>${paint.error ?? `The request was ${paint.state}.`}</p></${Notice}>`;
  const src = (/** @type {any} */ one) => `/api/paint/${paint.id}/${one.name}.png`;
  return html`<section class="panel" aria-label="Result">
    <div class="shots">${paint.pictures.map((/** @type {any} */ one) => html`<figure class="shot result"><img src=${src(one)} alt=${`${paint.values.prompt[0]}${one.column ? `, ${one.column}` : ""}`} />
      <figcaption>${one.column === "scale 0" ? "no adapter" : one.column || `seed ${paint.values.seed ?? 0}`} <a href=${src(one)} download=${`${paint.id}-${one.name}.png`}>Save</a></figcaption></figure>`)}</div>
    <details class="small"><summary>The command</summary><${Command} command=${paint.command} /></details>
  </section>`;
}

/** @param {{adapter: any}} props */
function Studio({ adapter }) {
  const drawing = useRef(/** @type {any} */ (null));
  const [form, setForm] = useState({ prompt: adapter.prompts[0] ?? "", negative: "", seed: 0, num: 1, steps: 20, guidance: 5, scale: 1, condition_factor: 1, control_guidance: 1, strip: "one", checkpoint: adapter.is_finished ? "" : String(adapter.checkpoints.at(-1) ?? "") });
  const [paint, setPaint] = useState(/** @type {any} */ (null));
  const [progress, setProgress] = useState(/** @type {any} */ ({}));
  const [area, setArea] = useState([adapter.resolution ?? 512, adapter.resolution ?? 512]);
  const [history, setHistory] = useState(/** @type {any[]} */ ([]));
  const pending = useRef(/** @type {{id: string, kind: string} | null} */ (null));
  const set = (/** @type {string} */ name) => (/** @type {any} */ event) => setForm({ ...form, [name]: event.target.type === "number" || event.target.type === "range" ? +event.target.value : event.target.value });
  const load = async () => setHistory((await get("/api/paint")).filter((/** @type {any} */ one) => one.kind === "paint" && one.run === adapter.id && one.state === "done").slice(0, 12));
  useEffect(() => void load(), [adapter.id]);
  const finish = async (/** @type {string} */ id) => {
    const found = await get(`/api/paint/${id}`);
    if (found.state === "running" || pending.current?.id !== id) return;
    const { kind } = pending.current;
    pending.current = null;
    if (kind === "map" && found.state === "done") {
      const picture = new Image();
      picture.src = `/api/paint/${id}/map.png`;
      await picture.decode();
      drawing.current.show(picture);
      setPaint(null);
    } else {
      setPaint(found);
      load();
    }
  };
  useEffect(() => on("paint", (event) => {
    if (event.id !== pending.current?.id) return;
    if (event.event === "phase") setProgress({ text: event.text });
    if (event.event === "progress") setProgress({ text: event.phase, done: event.done, total: event.total });
    if (event.event === "end") finish(event.id);
  }), []);
  const begin = (/** @type {string} */ id, /** @type {string} */ kind) => {
    pending.current = { id, kind };
    setProgress({});
    setPaint({ id, state: "running" });
    finish(id);
  };
  const step = form.checkpoint === "" ? null : form.checkpoint;
  const { run: ask, isBusy, error } = useAction(async () => {
    const sent = await putPicture("/api/uploads", await drawing.current.blob());
    const { strip, checkpoint, ...values } = form;
    const grid = STRIPS[/** @type {keyof typeof STRIPS} */ (strip)];
    const asked = { ...values, prompt: [values.prompt], negative: values.negative || null, scale: [values.scale], condition_factor: [values.condition_factor], control_guidance: [values.control_guidance], ...(area[0] === area[1] ? {} : { width: area[0], height: area[1] }), ...(grid ? { grid } : {}), ...(strip === "seeds" ? { num: 4 } : {}) };
    begin((await post("/api/paint", { adapter: adapter.id, checkpoint: step, condition: sent.id, values: asked })).id, "paint");
  });
  const { run: map, error: mapError } = useAction(async (/** @type {File} */ file) => {
    const sent = await putPicture("/api/uploads", file);
    begin((await post("/api/maps", { adapter: adapter.id, checkpoint: step, upload: sent.id, condition: "" })).id, "map");
  });
  const { run: take, error: takeError } = useAction(async (/** @type {File} */ file) => {
    const sent = await putPicture("/api/uploads", file);
    const picture = new Image();
    picture.src = `/api/uploads/${sent.id}`;
    await picture.decode();
    drawing.current.show(picture);
  });
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    ask();
  };
  const onKey = (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !isBusy) ask();
  };
  const wrong = (/** @type {string} */ name) => (error?.option === name ? error.message : undefined);
  const amount = (/** @type {string} */ name, /** @type {string} */ label, /** @type {any} */ more, /** @type {string} */ help) => html`<${Field} label=${label} help=${help} error=${wrong(name)} control=${(/** @type {any} */ a) => html`<input ...${a} type="number" value=${/** @type {any} */ (form)[name]} onInput=${set(name)} ...${more} />`} />`;
  return html`<div onKeyDown=${onKey}>
    <div class="try">
      <${Board} adapter=${adapter} drawing=${drawing} area=${area} onArea=${setArea} onPhoto=${map} onMap=${take} />
      <form class="panel" onSubmit=${submit} aria-label="What to generate">
        <${Field} label="Prompt" error=${wrong("prompt")} control=${(/** @type {any} */ a) => html`<textarea ...${a} rows="3" value=${form.prompt} onInput=${set("prompt")} required></textarea>`} />
        <${Field} label="Negative prompt" control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${form.negative} onInput=${set("negative")} />`} />
        <${Field} label=${`Strength of the adapter: ${number(form.scale)}`} help="0 is the base alone, 1 is as in training." control=${(/** @type {any} */ a) => html`<input ...${a} type="range" min="0" max="2" step="0.05" value=${form.scale} onInput=${set("scale")} style=${{ width: "100%" }} />`} />
        <div class="fields">
          ${amount("seed", "Seed", { min: 0, step: 1 }, "The same seed makes the same picture.")}
          ${amount("steps", "Steps", { min: 1, max: 200, step: 1 }, "More take longer.")}
          ${amount("guidance", "Guidance", { min: 0, max: 30, step: 0.5 }, "How strongly the prompt counts.")}
          ${amount("condition_factor", "Share of the steps", { min: 0, max: 1, step: 0.05 }, "The adapter acts in the first ones.")}
          ${amount("control_guidance", "Control guidance", { min: 1, max: 30, step: 0.5 }, "Above 1 amplifies the condition.")}
          <${Field} label="Show" control=${(/** @type {any} */ a) => html`<select ...${a} value=${form.strip} onChange=${set("strip")}><option value="one">one picture</option><option value="strengths">four strengths</option><option value="seeds">four seeds</option></select>`} />
          ${adapter.checkpoints.length > 0 && html`<${Field} label="Weights" control=${(/** @type {any} */ a) => html`<select ...${a} value=${form.checkpoint} onChange=${set("checkpoint")}>${adapter.is_finished && html`<option value="">finished adapter</option>`}${adapter.checkpoints.map((/** @type {number} */ one) => html`<option value=${String(one)}>checkpoint ${one}</option>`)}</select>`} />`}
        </div>
        <${Problem} error=${error ?? mapError ?? takeError} />
        <button type="submit" class="main" disabled=${isBusy || paint?.state === "running" || !canWrite()} title="Ctrl+Enter">Generate</button>
      </form>
    </div>
    <${Result} paint=${paint} progress=${progress} onCancel=${() => post(`/api/paint/${paint.id}/cancel`)} />
    ${history.length > 0 && html`<section aria-label="Earlier pictures"><h2>Earlier pictures</h2><div class="shots">${history.map((one) => html`<button type="button" class="plain shot small-shot" onClick=${() => setPaint(one)}><img src=${`/api/paint/${one.id}/${one.pictures[0].name}.png`} alt=${one.values.prompt[0]} loading="lazy" /></button>`)}</div></section>`}
  </div>`;
}

/** @param {{id: string | null}} props */
export default function Try({ id }) {
  const { data: all, error } = useGet("/api/adapters");
  const chosen = id ?? all?.[0]?.id ?? null;
  const { data: adapter, error: missing } = useGet(chosen ? `/api/adapters/${chosen}` : null);
  if (error) return html`<div><h1>Try</h1><${Problem} error=${error} /></div>`;
  if (!all) return html`<${Loading} />`;
  if (!all.length) return html`<div><h1>Try</h1><${Empty} title="No adapter yet"><p>Train one, or run the demo: it ends with an adapter that can be tried here.</p><p><a class="button" href="/">To the runs</a></p></${Empty}></div>`;
  return html`<div><div class="row spread"><h1>Try</h1>
    <label>Adapter <select value=${chosen} onChange=${(/** @type {any} */ event) => go(`/try/${event.target.value}`)}>${all.map((/** @type {any} */ one) => html`<option value=${one.id}>${one.name}${one.is_finished ? "" : " (checkpoints)"}</option>`)}</select></label></div>
    <${Problem} error=${missing} />
    ${adapter ? html`<p class="quiet small">Condition: ${adapter.condition.name ?? adapter.condition.kind ?? "not recorded"}${adapter.condition.polarity && adapter.condition.polarity !== "none" ? `, ${adapter.condition.polarity}` : ""}; ${adapter.resolution ?? "?"} px; base ${adapter.base ?? "not recorded"}</p><${Studio} key=${adapter.id} adapter=${adapter} />` : !missing && html`<${Loading} label="Reading the adapter" />`}
  </div>`;
}
