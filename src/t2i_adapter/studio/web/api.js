// @ts-check
// Requests to the server. Every error has a sentence for people and, if it is about an option, its path.

export class ApiError extends Error {
  /** @param {number} status @param {string} message @param {string | null} option @param {any} [body] */
  constructor(status, message, option, body) {
    super(message);
    this.status = status;
    this.option = option;
    this.body = body;
  }
}

/** @param {Response} response */
async function read(response) {
  const kind = response.headers.get("content-type") || "";
  const body = kind.includes("json") ? await response.json() : null;
  if (response.ok) return body;
  const text = body?.error || `The server answered ${response.status}.`;
  throw new ApiError(response.status, text, body?.option ?? null, body);
}

/** @param {string} method @param {string} path @param {BodyInit | undefined} body @param {string} type */
async function send(method, path, body, type) {
  let response;
  try {
    // A request that is on its way when the page closes still arrives; a browser allows that for short bodies.
    const keepalive = typeof body === "string" && body.length < 8_000;
    response = await fetch(path, { method, body, keepalive, headers: body === undefined ? {} : { "content-type": type } });
  } catch {
    throw new ApiError(0, "The studio does not answer. Its terminal says why; runs go on without it.", null);
  }
  return read(response);
}

/** @param {string} path */
export const get = (path) => send("GET", path, undefined, "");
/** @param {string} path @param {any} [content] */
export const post = (path, content = {}) => send("POST", path, JSON.stringify(content), "application/json");
/** @param {string} path @param {any} content */
export const put = (path, content) => send("PUT", path, JSON.stringify(content), "application/json");
/** Sends a picture as it is. @param {string} path @param {Blob} picture */
export const putPicture = (path, picture) => send("PUT", path, picture, picture.type);
