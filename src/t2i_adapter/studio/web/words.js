// @ts-check
// Numbers, times and states in words.

/** @param {number | null | undefined} bytes */
export function size(bytes) {
  if (bytes == null) return "unknown";
  for (const [unit, scale] of /** @type {[string, number][]} */ ([["TB", 1e12], ["GB", 1e9], ["MB", 1e6]])) {
    if (bytes >= scale) return `${(bytes / scale).toFixed(bytes / scale < 10 ? 1 : 0)} ${unit}`;
  }
  return bytes < 1e3 ? `${bytes} bytes` : `${Math.round(bytes / 1e3)} KB`;
}

/** Memory, which cards are sold by in powers of two. @param {number} bytes */
export const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(bytes < 2 ** 30 ? 2 : 1)} GiB`;

/** @param {number | null | undefined} seconds */
export function duration(seconds) {
  if (seconds == null || !isFinite(seconds)) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days ${hours % 24} h`;
}

/** @param {number | null | undefined} at seconds since 1970 */
export function ago(at) {
  if (!at) return "";
  const past = Date.now() / 1000 - at;
  return past < 45 ? "just now" : past < 86400 ? `${duration(past)} ago` : new Date(at * 1000).toLocaleDateString();
}

/** @param {number | null | undefined} at seconds since 1970 */
export const moment = (at) => (at ? new Date(at * 1000).toLocaleString() : "");

/** @param {number | null | undefined} value @param {number} [digits] */
export const number = (value, digits = 3) =>
  value == null || !isFinite(value) ? "" : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(digits));

/** @param {number | null | undefined} value */
export const whole = (value) => (value == null ? "" : value.toLocaleString("en-US"));

/** [mean, low, high] as "34 % (31 to 37 %)". @param {(number | null)[] | null | undefined} interval */
export function percent(interval) {
  if (!interval || interval[0] == null) return "";
  const show = (/** @type {number} */ x) => (100 * x).toFixed(Math.abs(x) >= 0.0995 ? 0 : 1);
  const [mean, low, high] = interval;
  return `${show(mean)} %${low == null || high == null ? "" : ` (${show(low)} to ${show(high)} %)`}`;
}

/** [mean, low, high] as "0.62 (0.58 to 0.66)". @param {(number | null)[] | null | undefined} interval */
export function bounds(interval) {
  if (!interval || interval[0] == null) return "";
  const [mean, low, high] = interval;
  return `${number(mean)}${low == null || high == null ? "" : ` (${number(low)} to ${number(high)})`}`;
}

/** State -> the look of its badge. @type {Record<string, string>} */
export const LOOKS = {
  running: "busy",
  queued: "calm",
  finished: "good",
  done: "good",
  stopped: "wait",
  unfinished: "wait",
  cancelled: "calm",
  failed: "bad",
  killed: "bad",
  died: "bad",
  adapter: "calm",
};
