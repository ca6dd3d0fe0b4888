// @ts-check
// What the server knows, live: jobs, runs, device. One stream of events for the whole page.
import { batch, signal } from "./vendor/ui.js";
import { get } from "./api.js";

/** What every page needs: {version, root, role, verbs, device, ...}; null while it loads. */
export const state = signal(/** @type {any} */ (null));
/** Id -> job, as the server sends it. */
export const jobs = signal(/** @type {Record<string, any>} */ ({}));
/** Id -> row of a run. */
export const runs = signal(/** @type {Record<string, any>} */ ({}));
export const device = signal(/** @type {any} */ (null));
/** "loading", "live", "lost" (tries again by itself) or "refused" (no cookie). */
export const connection = signal("loading");
/** The last error of loading, for a page that has nothing to show. */
export const fault = signal(/** @type {any} */ (null));

/** @type {Map<string, Set<(data: any) => void>>} */
const listeners = new Map();
/** @type {EventSource | null} */
let source = null;
let last = "";

/** Calls `listener` with the data of each event of this name; returns a function that ends it.
 * @param {string} name @param {(data: any) => void} listener */
export function on(name, listener) {
  if (!listeners.has(name)) listeners.set(name, new Set());
  listeners.get(name)?.add(listener);
  return () => listeners.get(name)?.delete(listener);
}

/** @param {string} name @param {any} data */
function tell(name, data) {
  for (const listener of listeners.get(name) ?? []) listener(data);
}

/** Reads everything anew. */
export async function refresh() {
  try {
    const [own, allJobs, allRuns] = await Promise.all([get("/api/state"), get("/api/jobs"), get("/api/runs")]);
    batch(() => {
      state.value = own;
      device.value = own.device;
      jobs.value = Object.fromEntries(allJobs.map((/** @type {any} */ job) => [job.id, job]));
      runs.value = Object.fromEntries(allRuns.map((/** @type {any} */ run) => [run.id, run]));
      fault.value = null;
    });
    if (!last) last = String(own.event);
  } catch (error) {
    fault.value = error;
    if (/** @type {any} */ (error).status === 401) connection.value = "refused";
  }
}

/** @type {Record<string, (data: any) => void>} */
const changes = {
  job: (job) => (jobs.value = { ...jobs.value, [job.id]: job }),
  job_gone: ({ id }) => (jobs.value = without(jobs.value, id)),
  run: (run) => (runs.value = { ...runs.value, [run.id]: run }),
  run_gone: ({ id }) => (runs.value = without(runs.value, id)),
  device: (found) => (device.value = found),
};

/** @param {Record<string, any>} all @param {string} id */
function without(all, id) {
  const { [id]: _, ...rest } = all;
  return rest;
}

const NAMES = ["hello", "reset", "job", "job_gone", "run", "run_gone", "device", "metrics", "run_reset", "picture", "log", "paint", "data"];

function open() {
  if (source) return;
  source = new EventSource(`/api/events${last ? `?after=${last}` : ""}`);
  source.onopen = () => (connection.value = "live");
  source.onerror = () => {
    if (connection.value !== "refused") connection.value = "lost";
  };
  for (const name of NAMES) {
    source.addEventListener(name, (event) => {
      last = event.lastEventId || last;
      const data = JSON.parse(event.data);
      if (name === "reset") refresh();
      batch(() => {
        changes[name]?.(data);
        tell(name, data);
      });
    });
  }
}

function close() {
  source?.close();
  source = null;
}

/** Loads everything and opens the stream. A hidden page closes it: a browser allows few connections to one server. */
export async function start() {
  await refresh();
  open();
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
}
