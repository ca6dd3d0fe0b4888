// @ts-check
// Addresses: the part of the page that an address shows, and moves without loading the page again.
import { signal } from "./vendor/ui.js";

/** The present address. */
export const address = signal(new URL(location.href));

addEventListener("popstate", () => (address.value = new URL(location.href)));

/** Goes to an address of the studio. @param {string} to @param {{replace?: boolean}} [how] */
export function go(to, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", to);
  address.value = new URL(location.href);
  if (!replace) scrollTo(0, 0);
}

/** Lets links of the studio move without loading. @param {MouseEvent} event */
export function onLink(event) {
  const link = /** @type {any} */ (event.target)?.closest?.("a[href]");
  const isPlain = event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey && !event.altKey;
  if (!link || !isPlain || event.defaultPrevented || link.target || link.hasAttribute("download")) return;
  const url = new URL(link.href);
  if (url.origin !== location.origin || url.pathname.startsWith("/api/") || url.pathname.startsWith("/static/")) return;
  event.preventDefault();
  go(url.pathname + url.search + url.hash);
}
