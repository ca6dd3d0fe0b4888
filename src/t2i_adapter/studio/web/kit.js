// @ts-check
// Parts of pages: notices, badges, fields, dialogs. Views only; what they show is passed in.
import { html, signal, useCallback, useEffect, useId, useRef, useState } from "./vendor/ui.js";
import { get } from "./api.js";
import { state } from "./live.js";
import { LOOKS, duration, size } from "./words.js";

/** Reads `path` when it changes. `reload` reads again; what was read stays meanwhile.
 * @param {string | null} path null reads nothing */
export function useGet(path) {
  const [found, setFound] = useState({ data: /** @type {any} */ (null), error: /** @type {any} */ (null), path: "" });
  const latest = useRef("");
  const reload = useCallback(async () => {
    if (!path) return;
    latest.current = path;
    try {
      const data = await get(path);
      if (latest.current === path) setFound({ data, error: null, path });
    } catch (error) {
      if (latest.current === path) setFound({ data: null, error, path });
    }
  }, [path]);
  useEffect(() => void reload(), [reload]);
  const isHere = found.path === path;
  return { data: isHere ? found.data : null, error: isHere ? found.error : null, isLoading: !isHere && !!path, reload };
}

/** Runs an action of a button: `run` calls it, `isBusy` while it works, `error` if it failed.
 * @param {(...args: any[]) => Promise<any>} action */
export function useAction(action) {
  const [isBusy, setBusy] = useState(false);
  const [error, setError] = useState(/** @type {any} */ (null));
  const run = async (/** @type {any[]} */ ...args) => {
    setBusy(true);
    setError(null);
    try {
      return await action(...args);
    } catch (problem) {
      setError(problem);
    } finally {
      setBusy(false);
    }
  };
  return { run, isBusy, error, clear: () => setError(null) };
}

/** Seconds that a phase still takes at the rate since it was first seen here; null until that is known.
 * @param {any} progress the last line of a job's progress */
export function useTimeLeft(progress) {
  const first = useRef(/** @type {any} */ (null));
  if (!progress?.phase) return null;
  if (first.current?.phase !== progress.phase) first.current = progress;
  const made = progress.done - first.current.done;
  const seconds = progress.time - first.current.time;
  return progress.total && made > 0 && seconds >= 2 ? ((progress.total - progress.done) / made) * seconds : null;
}

/** Whether this page may change anything. */
export const canWrite = () => state.value?.role === "owner";

/** @param {{state: string, label?: string}} props */
export const Badge = ({ state: name, label }) => html`<span class=${`badge ${LOOKS[name] ?? "calm"}`}>${label ?? name}</span>`;

/** A sentence in which \`words\` are code. @param {{text: string}} props */
export const Sentence = ({ text }) => html`${text.split("`").map((part, n) => (n % 2 ? html`<code>${part}</code>` : part))}`;

/** A bar with its numbers in words; left: seconds. @param {{done: number, total: number | null, label: string, left?: number | null}} props */
export function Progress({ done, total, label, left }) {
  const share = total ? Math.min(1, done / total) : 0;
  return html`<div class="progress">
    <progress aria-label=${label} max="1" value=${total ? share : undefined}></progress>
    <span class="quiet">${label}${total ? ` ${done.toLocaleString("en-US")} of ${total.toLocaleString("en-US")}` : ""}${left ? `, about ${duration(left)} left` : ""}</span>
  </div>`;
}

/** An error of `api.js`. @param {{error: any, children?: any}} props */
export const Problem = ({ error, children }) =>
  error ? html`<div class="notice bad" role="alert"><p>${error.message}</p>${children}</div>` : null;

/** @param {{kind?: string, children?: any}} props */
export const Notice = ({ kind = "calm", children }) => html`<div class=${`notice ${kind}`}>${children}</div>`;

/** @param {{label?: string}} props */
export const Loading = ({ label = "Loading" }) => html`<p class="quiet pad" role="status">${label} ...</p>`;

/** What a page shows when there is nothing yet. @param {{title: string, children?: any}} props */
export const Empty = ({ title, children }) => html`<section class="empty"><h2>${title}</h2>${children}</section>`;

/** A button that runs an action and shows its error. `quiet`: looks less important; `danger`: red.
 * @param {{onClick: (...args: any[]) => any, children?: any, look?: string, disabled?: boolean, title?: string}} props */
export function Button({ onClick, children, look = "", disabled = false, title }) {
  const { run, isBusy, error, clear } = useAction(async () => onClick());
  return html`<span class="act">
    <button type="button" class=${look} disabled=${disabled || isBusy} aria-busy=${isBusy} title=${title} onClick=${run}>${children}</button>
    ${error && html`<span class="act-error" role="alert">${error.message} <button type="button" class="plain" aria-label="Close" onClick=${clear}>×</button></span>`}
  </span>`;
}

/** A command line that can be copied. @param {{command: string, label?: string}} props */
export function Command({ command, label = "Command" }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(command);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<div class="command"><code aria-label=${label} tabindex="0">${command}</code>
    <button type="button" class="quiet-button" onClick=${copy}>${isCopied ? "Copied" : "Copy"}</button></div>`;
}

/** An option's path as a label: its last word for the eye, and the path as the command line has it. @param {string} path */
export const labelOf = (path) => {
  const words = (path.split(".").pop() ?? path).replaceAll("_", " ");
  return html`${words[0].toUpperCase()}${words.slice(1)} <code class="path">${path}</code>`;
};

/** A label, a control, its help and its error. `control` gets {id, "aria-describedby", "aria-invalid"}.
 * @param {{label: any, help?: string, error?: string, control: (attributes: any) => any, hint?: any}} props */
export function Field({ label, help, error, control, hint }) {
  const id = useId();
  const described = [help && `${id}-help`, error && `${id}-error`].filter(Boolean).join(" ");
  const attributes = { id, "aria-describedby": described || undefined, "aria-invalid": error ? "true" : undefined };
  return html`<div class=${`field ${error ? "wrong" : ""}`}>
    <label for=${id}>${label}</label>
    <div>${control(attributes)}${hint}</div>
    ${error && html`<p class="field-error" id=${`${id}-error`}>${error}</p>`}
    ${help && html`<p class="help" id=${`${id}-help`}>${help}</p>`}
  </div>`;
}

/** A modal dialog; Escape closes it. @param {{title: string, onClose: () => void, children?: any}} props */
export function Dialog({ title, onClose, children }) {
  const ref = useRef(/** @type {any} */ (null));
  const id = useId();
  useEffect(() => {
    const before = /** @type {any} */ (document.activeElement);
    ref.current?.showModal();
    return () => before?.focus?.();
  }, []);
  return html`<dialog ref=${ref} aria-labelledby=${id} onClose=${onClose} onCancel=${onClose}>
    <header><h2 id=${id}>${title}</h2><button type="button" class="plain" aria-label="Close" onClick=${onClose}>×</button></header>
    ${children}
  </dialog>`;
}

/** Tabs of a page. @param {{label: string, tabs: {id: string, label: string}[], at: string, onChange: (id: string) => void}} props */
export function Tabs({ label, tabs, at, onChange }) {
  const move = (/** @type {KeyboardEvent} */ event) => {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (!step) return;
    const place = tabs.findIndex((tab) => tab.id === at);
    const next = tabs[(place + step + tabs.length) % tabs.length];
    onChange(next.id);
    /** @type {any} */ (event.currentTarget)?.querySelector(`[data-tab="${next.id}"]`)?.focus();
  };
  return html`<div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
    ${tabs.map((tab) => html`<button type="button" role="tab" data-tab=${tab.id} aria-selected=${tab.id === at} tabindex=${tab.id === at ? 0 : -1} onClick=${() => onChange(tab.id)}>${tab.label}</button>`)}
  </div>`;
}

/** Chooses a folder, or a file that may be a dataset, below the root: `onPick` gets its path.
 * @param {{title: string, onPick: (path: string) => void, onClose: () => void, files?: boolean}} props */
export function Picker({ title, onPick, onClose, files = false }) {
  const [trail, setTrail] = useState([{ id: "", name: "top" }]);
  const at = trail[trail.length - 1];
  const { data, error, isLoading } = useGet(`/api/folders?at=${at.id}`);
  const child = (/** @type {any} */ entry) => (data.path === "." ? entry.name : `${data.path}/${entry.name}`);
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <nav class="trail" aria-label="Folders">${trail.map((place, n) => html`<button type="button" class="plain" onClick=${() => setTrail(trail.slice(0, n + 1))}>${place.name}</button>`)}</nav>
    <${Problem} error=${error} />
    ${isLoading && html`<${Loading} />`}
    ${data && html`<ul class="picker">
      ${data.folders.map((/** @type {any} */ entry) => html`<li><button type="button" class="plain" onClick=${() => setTrail([...trail, entry])}>📁 ${entry.name}</button></li>`)}
      ${files && data.files.map((/** @type {any} */ entry) => html`<li><button type="button" class="plain" onClick=${() => onPick(child(entry))}>${entry.name}</button></li>`)}
      ${!data.folders.length && html`<li class="quiet">No folder in here.</li>`}
    </ul>
    <footer><button type="button" onClick=${() => onPick(data.path)}>Take this folder: ${data.path}</button></footer>`}
  </${Dialog}>`;
}

/** Bytes used and free. @param {{label: string, used: number, total: number}} props */
export const Meter = ({ label, used, total }) => html`<div class="meter">
  <span>${label}</span><meter min="0" max=${total} value=${used} aria-label=${label}></meter>
  <span class="quiet">${size(used)} of ${size(total)}</span></div>`;

/** The theme: "auto" follows the system. */
export const theme = signal(localStorage.getItem("theme") || "auto");

/** @param {string} name */
export function setTheme(name) {
  theme.value = name;
  localStorage.setItem("theme", name);
  document.documentElement.dataset.theme = name;
}
