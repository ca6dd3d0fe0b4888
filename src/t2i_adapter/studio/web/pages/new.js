// @ts-check
// New run: choose a recipe, change what matters, see what it will cost, start it. Form and recipe text are one thing.
import { html, useEffect, useMemo, useRef, useState } from "../vendor/ui.js";
import { get, post, put } from "../api.js";
import { Button, Command, Dialog, Field, Loading, Notice, Picker, Problem, canWrite, labelOf, useAction, useGet } from "../kit.js";
import { jobs, runs, state } from "../live.js";
import { go } from "../router.js";
import { duration, gib, number, size } from "../words.js";

const BASICS = ["data.location", "data.condition", "base.name", "data.resolution", "train.max_steps", "train.batch_size", "train.mixed_precision", "optim.lr", "checkpoint.every", "validation.prompts", "validation.images"];
const SIZES = ["8GB", "12GB", "16GB", "24GB", "40GB", "80GB"];
const DRAFT = "new-run";

/** @param {{option: any, value: any, error?: string, onChange: (value: any) => void, kinds: string[]}} props */
function Option({ option, value, error, onChange }) {
  const [isPicking, setPicking] = useState(false);
  const shown = value === undefined ? option.default : value;
  const set = (/** @type {any} */ event) => {
    const text = event.target.value;
    if (text === "" && option.optional) return onChange(null);
    if (["integer", "number"].includes(option.kind)) return onChange(text === "" || isNaN(Number(text)) ? text : Number(text));
    onChange(text);
  };
  const control = (/** @type {any} */ a) => {
    if (option.kind === "switch") return html`<input ...${a} type="checkbox" checked=${!!shown} onChange=${(/** @type {any} */ event) => onChange(event.target.checked)} />`;
    if (option.kind === "choice") return html`<select ...${a} value=${shown ?? ""} onChange=${(/** @type {any} */ event) => onChange(event.target.value === "" ? null : event.target.value)}>${option.optional && html`<option value="">by default</option>`}${option.choices.map((/** @type {any} */ one) => html`<option value=${one}>${one}</option>`)}</select>`;
    if (option.kind === "list") return html`<textarea ...${a} rows=${Math.max(1, Math.min(6, (shown ?? []).length))} value=${(shown ?? []).join("\n")} onInput=${(/** @type {any} */ event) => onChange(event.target.value === "" ? [] : event.target.value.split("\n"))}></textarea>`;
    return html`<input ...${a} type="text" inputmode=${option.kind === "integer" ? "numeric" : undefined} value=${shown ?? ""} placeholder=${option.optional ? "by default" : ""} onInput=${set} />`;
  };
  const isPath = ["dataset", "folder", "output", "model", "file"].includes(option.names);
  return html`<div data-option=${option.path} class=${value !== undefined ? "changed" : ""}>
    <${Field} label=${labelOf(option.path)} help=${option.help + (option.kind === "list" ? " One a line." : "")} error=${error} control=${control}
      hint=${html`<span class="row small">${isPath && option.kind !== "list" && html`<button type="button" class="quiet-button" onClick=${() => setPicking(true)}>Choose ...</button>`}${value !== undefined && html`<button type="button" class="plain" onClick=${() => onChange(undefined)} aria-label=${`${option.path} back to its default`}>Default</button>`}</span>`} />
    ${isPicking && html`<${Picker} title=${option.path} files=${option.names === "dataset"} onClose=${() => setPicking(false)} onPick=${(/** @type {string} */ path) => { onChange(path); setPicking(false); }} />`}
  </div>`;
}

/** @param {{recipes: any[], onChoose: (values: any) => void}} props */
const Recipes = ({ recipes, onChoose }) => html`<section class="panel" aria-label="Recipes"><h2>Begin with a recipe</h2>
  <ul class="recipes">${recipes.map((one) => html`<li><button type="button" disabled=${!one.values} onClick=${() => onChoose(one.values)}><b>${one.id}</b><span class="small">${one.about}</span></button></li>`)}</ul>
</section>`;

/** Keeps the options as a recipe. @param {{yaml: string, recipes: any[], onClose: () => void}} props */
function Save({ yaml, recipes, onClose }) {
  const [name, setName] = useState("");
  const [isOver, setOver] = useState(false);
  const present = recipes.find((one) => one.id === name && one.is_own);
  const { run: save, isBusy, error } = useAction(async () => {
    await put(`/api/recipes/${encodeURIComponent(name)}`, { yaml, was: isOver && present ? present.yaml : "" });
    onClose();
  });
  const onSubmit = (/** @type {Event} */ event) => {
    event.preventDefault();
    event.stopPropagation();
    save();
  };
  return html`<${Dialog} title="Save as a recipe" onClose=${onClose}><div role="form" aria-label="Recipe" onKeyDown=${(/** @type {KeyboardEvent} */ event) => event.key === "Enter" && /** @type {any} */ (event.target).tagName === "INPUT" && onSubmit(event)}>
    <${Field} label="Name" help=${`The file will be recipes/${name || "NAME"}.yaml. Small letters, digits, dashes and underscores.`} error=${error?.message} control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${name} autocomplete="off" onInput=${(/** @type {any} */ event) => setName(event.target.value)} />`} />
    ${present && html`<p><label><input type="checkbox" checked=${isOver} onChange=${(/** @type {any} */ event) => setOver(event.target.checked)} /> Replace the recipe of this name</label></p>`}
    <footer><button type="button" class="main" disabled=${isBusy || !name} onClick=${onSubmit}>Save</button></footer></div></${Dialog}>`;
}

const PARTS = /** @type {[string, string, string][]} */ ([["program", "the program", "line5"], ["base", "base", "line0"], ["adapter", "adapter", "line2"], ["optimizer", "optimiser", "line3"], ["ema", "EMA", "line4"], ["step", "one step", "line1"]]);

/** What a plan found: memory by parts against the card, hours, money, disk. @param {{found: any}} props */
function Needs({ found }) {
  const { memory, disk, plan } = found;
  const fits = memory.total_with_allocator <= memory.room;
  const parts = PARTS.filter(([name]) => memory[name] > 0);
  const whole_ = Math.max(memory.room, memory.total);
  const hours = Array.isArray(found.hours) ? found.hours : found.hours == null ? null : [found.hours];
  const range = (/** @type {number[]} */ values) => values.map((value) => number(value)).join(" to ");
  const costs = found.cost == null ? null : Array.isArray(found.cost) ? found.cost : [found.cost];
  return html`<div aria-label="The plan" role="group" tabindex="0">
    <p class=${fits ? "" : "field-error"}><b>${gib(memory.total)}</b> of memory, of ${gib(memory.room)} on ${found.card ?? `this ${plan.device}`}: ${memory.largest_batch ? `the largest micro-batch is ${memory.largest_batch.toLocaleString("en-US")}` : "too little for one sample"}.</p>
    <div class="stack" role="img" aria-label=${parts.map(([name, label]) => `${label} ${gib(memory[name])}`).join(", ")}>${parts.map(([name, , colour]) => html`<span style=${{ width: `${(100 * memory[name]) / whole_}%`, background: `var(--${colour})` }}></span>`)}</div>
    <ul class="key small">${parts.map(([name, label, colour]) => html`<li><span class="dot" style=${{ background: `var(--${colour})` }}></span> ${label} ${gib(memory[name])}</li>`)}</ul>
    <dl class="facts">
      <div><dt>updates</dt><dd>${plan.steps.toLocaleString("en-US")} of ${plan.global_batch} samples</dd></div>
      <div><dt>disk</dt><dd>${size(disk.cache)} of cache, ${size(disk.output)} for the run</dd></div>
      <div><dt>time</dt><dd>${hours ? `${hours.map((/** @type {number} */ one) => duration(one * 3600)).join(" to ")} (${found.speed_is})` : "not measured"}</dd></div>
      ${costs && html`<div><dt>cost</dt><dd>${range(costs)}</dd></div>`}
    </dl></div>`;
}

/** What the run will need, as the verb `plan` predicts it. @param {{values: any, isReady: boolean}} props */
function Plan({ values, isReady }) {
  const { data: names } = useGet("/api/cards");
  const [card, setCard] = useState("");
  const [id, setId] = useState("");
  const [found, setFound] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const job = jobs.value[id];
  const ask = async () => {
    setFound(null);
    setError(null);
    setId((await post("/api/plan", { values, card })).id);
  };
  useEffect(() => {
    if (job?.state === "done") get(`/api/plan/${id}`).then((answer) => setFound(answer.plan), setError);
  }, [job?.state]);
  const isAtWork = job && ["queued", "running"].includes(job.state);
  return html`<section class="panel" aria-label="Plan"><h2>What it will need</h2>
    <div class="row"><label>Card <select value=${card} onChange=${(/** @type {any} */ event) => setCard(event.target.value)}><option value="">this machine</option>${[...(names ?? []), ...SIZES].map((/** @type {string} */ one) => html`<option value=${one}>${one}</option>`)}</select></label>
      <${Button} disabled=${!isReady || isAtWork} onClick=${ask}>${isAtWork ? "Planning ..." : "Plan it"}</${Button}></div>
    ${job?.error && html`<${Notice} kind="bad"><p>${job.error}</p></${Notice}>`}
    <${Problem} error=${error} />
    ${found && html`<${Needs} found=${found} />`}
  </section>`;
}

/** @param {{values: any, options: any[], errors: any[], change: (path: string, value: any) => void}} props */
function Form({ values, options, errors, change }) {
  const [find, setFind] = useState("");
  const [isChanged, setChanged] = useState(false);
  const error = (/** @type {string} */ path) => errors.find((one) => one.option === path || one.option?.startsWith(`${path}.`))?.message;
  const show = (/** @type {any} */ option) => html`<${Option} key=${option.path} option=${option} value=${values[option.path]} error=${error(option.path)} onChange=${(/** @type {any} */ value) => change(option.path, value)} />`;
  const word = find.trim().toLowerCase();
  const shown = options.filter((option) => (!isChanged || values[option.path] !== undefined) && (!word || option.path.includes(word) || option.help.toLowerCase().includes(word)));
  const groups = useMemo(() => [...new Set(options.map((option) => option.group))], [options]);
  return html`<div>
    <section class="panel" aria-label="Basics"><h2>Basics</h2><div class="two">${BASICS.map((path) => options.find((option) => option.path === path)).filter(Boolean).map(show)}</div></section>
    <section class="panel" aria-label="All options"><div class="row spread"><h2>All options</h2>
      <label>Find <input type="search" value=${find} onInput=${(/** @type {any} */ event) => setFind(event.target.value)} /></label>
      <label><input type="checkbox" checked=${isChanged} onChange=${(/** @type {any} */ event) => setChanged(event.target.checked)} /> Changed only</label></div>
      ${groups.map((group) => {
        const inside = shown.filter((option) => option.group === group && !BASICS.includes(option.path));
        return inside.length > 0 && html`<details key=${group} open=${!!word || isChanged || inside.some((option) => error(option.path))}><summary>${group || "run"} (${inside.length})</summary><div class="two">${inside.map(show)}</div></details>`;
      })}
      ${shown.length === 0 && html`<p class="quiet">No option fits.</p>`}</section>
  </div>`;
}

/** @param {{query: URLSearchParams}} props */
export default function New({ query }) {
  const { data: form, error: formError } = useGet("/api/form/train");
  const { data: recipes, reload } = useGet("/api/recipes");
  const [values, setValues] = useState(/** @type {Record<string, any> | null} */ (null));
  const [yaml, setYaml] = useState("");
  const [checked, setChecked] = useState({ errors: /** @type {any[]} */ ([]), command: "" });
  const [draftError, setDraftError] = useState(/** @type {any} */ (null));
  const was = useRef(/** @type {number | null} */ (null));
  const latest = useRef(/** @type {any} */ (null));
  const kept = useRef(/** @type {Promise<void>} */ (Promise.resolve()));
  const typing = useRef(false);
  const typed = useRef("");
  const isGone = useRef(false);
  const summary = useRef(/** @type {any} */ (null));
  const load = async () => {
    const draft = await get(`/api/drafts/${DRAFT}`);
    was.current = draft.was;
    const content = draft.content ?? {};
    const id = query.get("data");
    if (id) {
      const found = await get(`/api/data/${id}`);
      for (const [name, value] of Object.entries(found.values)) if (name !== "split" || value !== "train") content[`data.${name}`] = value;
      if (found.skipped) content["data.skip"] = found.skip_file;
    }
    setValues(content);
  };
  useEffect(() => {
    load();
    return () => (isGone.current = true);
  }, []);
  // One after another: each needs the version that the one before it wrote.
  const keep = (/** @type {any} */ content) => (kept.current = kept.current.then(async () => {
    try {
      was.current = (await put(`/api/drafts/${DRAFT}`, { content, was: was.current })).was;
      setDraftError(null);
    } catch (error) {
      setDraftError(error);
      if (/** @type {any} */ (error).status === 412) await load();
    }
  }));
  // Each change is kept, so that nothing typed is lost with the page, and checked as the command line would.
  useEffect(() => {
    if (!values || !canWrite()) return;
    latest.current = values;
    let isKept = false;
    const save = () => {
      if (!isKept) keep(values);
      isKept = true;
    };
    addEventListener("pagehide", save);
    const timer = setTimeout(async () => {
      save();
      try {
        const found = await post("/api/check", { verb: "train", values });
        if (latest.current !== values) return;
        setChecked({ errors: found.errors, command: found.command ?? "" });
        if (found.yaml !== undefined && !typing.current) setYaml(found.yaml);
      } catch (error) {
        setDraftError(error);
      }
    }, 250);
    return () => {
      clearTimeout(timer);
      removeEventListener("pagehide", save);
      if (isGone.current) save();
    };
  }, [values]);
  const change = (/** @type {string} */ path, /** @type {any} */ value) => {
    typing.current = false;
    setValues((before) => {
      const { [path]: _, ...rest } = before ?? {};
      return value === undefined ? rest : { ...rest, [path]: value };
    });
  };
  const readYaml = async (/** @type {string} */ text) => {
    typing.current = true;
    setYaml(text);
    typed.current = text;
    try {
      const found = await post("/api/check", { verb: "train", yaml: text });
      if (typed.current !== text) return; // an answer about older text
      if (found.values) setValues(found.values);
      else setChecked({ errors: found.errors, command: "" });
    } catch (error) {
      setDraftError(error);
    }
  };
  const { run: begin, isBusy, error } = useAction(async () => {
    const job = await post("/api/jobs", { verb: "train", values });
    await keep({});
    const known = Object.values(runs.value).find((row) => row.folder === job.run);
    go(known ? `/runs/${known.id}` : `/jobs/${job.id}?follow`);
  });
  const [isSaving, setSaving] = useState(false);
  if (formError) return html`<div><h1>New run</h1><${Problem} error=${formError} /></div>`;
  if (!form || !values || !recipes) return html`<${Loading} label="Reading the options" />`;
  const folder = values.output_dir ?? "";
  const isNamed = folder && folder !== "t2iadapter-model";
  const missing = [...(values["data.location"] ? [] : [{ option: "data.location", message: "Choose the dataset to train on." }]), ...(isNamed ? [] : [{ option: "output_dir", message: "Give the run a name." }])];
  const errors = [...checked.errors, ...missing];
  const away = checked.errors.filter((one) => !one.option);
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!errors.length) return begin();
    const first = errors.find((one) => one.option);
    const field = first && document.querySelector(`[data-option="${first.option}"] :is(input, select, textarea)`);
    /** @type {any} */ (field ?? summary.current)?.focus();
  };
  return html`<form onSubmit=${submit} novalidate>
    <h1>New run</h1>
    ${!canWrite() && html`<${Notice}><p>This link only shows. What is typed here is neither checked nor kept.</p></${Notice}>`}
    <${Problem} error=${draftError} />
    <${Recipes} recipes=${recipes} onChoose=${(/** @type {any} */ chosen) => { typing.current = false; setValues({ ...chosen, ...(values["data.location"] ? { "data.location": values["data.location"] } : {}) }); }} />
    <div class="new"><div>
      <section class="panel"><div data-option="output_dir"><${Field} label="Name of the run" help=${`Its folder: ${folder || `${state.value?.runs}/NAME`}`} error=${checked.errors.find((one) => one.option === "output_dir")?.message}
        control=${(/** @type {any} */ a) => html`<input ...${a} type="text" value=${folder.startsWith(`${state.value?.runs}/`) ? folder.slice(state.value.runs.length + 1) : folder} onInput=${(/** @type {any} */ event) => change("output_dir", event.target.value ? `${state.value?.runs}/${event.target.value}` : undefined)} />`} /></div></section>
      <${Form} values=${values} options=${form.options.filter((/** @type {any} */ option) => option.path !== "output_dir")} errors=${checked.errors} change=${change} />
    </div><aside class="beside">
      <section class="panel"><h2>Start</h2>
        ${errors.length > 0 && html`<div ref=${summary} tabindex="-1" class="notice wait"><p><b>${errors.length === 1 ? "One thing is to be done:" : `${errors.length} things are to be done:`}</b></p><ul>${errors.map((one) => html`<li>${one.message}</li>`)}</ul></div>`}
        <${Problem} error=${error} />
        <div class="row"><button type="submit" class="main" disabled=${isBusy || !canWrite()}>${Object.values(jobs.value).some((job) => job.queue === "device" && ["queued", "running"].includes(job.state)) ? "Put into the queue" : "Start"}</button>
          <button type="button" onClick=${() => setSaving(true)} disabled=${!yaml || !canWrite()}>Save as a recipe</button><button type="button" onClick=${() => setValues({})}>Clear</button></div>
        ${checked.command && html`<${Command} command=${checked.command} label="The command of this run" />`}
        ${!values["validation.prompts"] && html`<p class="help">Without validation prompts the run draws only its held-out pairs.</p>`}
      </section>
      <${Plan} values=${values} isReady=${!checked.errors.length && !!values["data.location"]} />
      <section class="panel"><${Field} label="Recipe" help="The same options as text; a change here changes the form." error=${away[0]?.message} control=${(/** @type {any} */ a) => html`<textarea ...${a} class="code" rows="16" spellcheck="false" disabled=${!canWrite()} value=${yaml} onInput=${(/** @type {any} */ event) => readYaml(event.target.value)}></textarea>`} /></section>
    </aside></div>
    ${isSaving && html`<${Save} yaml=${yaml} recipes=${recipes} onClose=${() => { setSaving(false); reload(); }} />`}
  </form>`;
}
