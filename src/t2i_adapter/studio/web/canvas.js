// @ts-check
// Drawing a condition: a canvas of its true size, with tools, undo and the pressure of a pen. No markup in here.

export const TOOLS = /** @type {[string, string, string][]} */ ([
  ["brush", "Brush", "b"],
  ["eraser", "Eraser", "e"],
  ["line", "Line", "l"],
  ["fill", "Fill", "f"],
  ["pick", "Take a colour", "i"],
]);
const MOST_UNDO = 20;

/** The pixels that a fill at (x, y) reaches: neighbours of one colour. Changes `data` (RGBA, width x height) in place.
 * @param {Uint8ClampedArray} data @param {number} width @param {number} height @param {number} x @param {number} y @param {number[]} colour */
export function flood(data, width, height, x, y, colour) {
  const pixels = new Uint32Array(data.buffer, data.byteOffset, width * height);
  const wanted = new Uint32Array(new Uint8ClampedArray([...colour, 255]).buffer)[0];
  const from = pixels[y * width + x];
  if (from === wanted) return;
  const waiting = [[x, y]];
  while (waiting.length) {
    const [px, py] = /** @type {number[]} */ (waiting.pop());
    let left = px;
    while (left > 0 && pixels[py * width + left - 1] === from) left--;
    let hasAbove = false;
    let hasBelow = false;
    for (let at = left; at < width && pixels[py * width + at] === from; at++) {
      pixels[py * width + at] = wanted;
      const above = py > 0 && pixels[(py - 1) * width + at] === from;
      if (above && !hasAbove) waiting.push([at, py - 1]);
      hasAbove = above;
      const below = py < height - 1 && pixels[(py + 1) * width + at] === from;
      if (below && !hasBelow) waiting.push([at, py + 1]);
      hasBelow = below;
    }
  }
}

/** @param {string} colour #rrggbb */
export const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

/** A drawing on a canvas element. `settings` may change at any time: {tool, colour, size}. */
export class Drawing {
  /** @param {HTMLCanvasElement} canvas @param {{tool: string, colour: string, size: number, ground: string, isSharp: boolean, onChange: () => void, onPick: (colour: string) => void}} settings */
  constructor(canvas, settings) {
    this.canvas = canvas;
    this.settings = settings;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
    /** @type {ImageData[]} */
    this.before = [];
    /** @type {ImageData[]} */
    this.after = [];
    /** @type {{x: number, y: number} | null} */
    this.last = null;
    /** @type {ImageData | null} */
    this.start = null;
    this.isEmpty = true;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#up());
  }

  /** Clears the canvas to the ground's colour. */
  clear() {
    if (!this.isEmpty) this.#keep();
    this.context.fillStyle = this.settings.ground;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.isEmpty = true;
    this.settings.onChange();
  }

  /** Shows a picture, fitted to the canvas. @param {CanvasImageSource} picture */
  show(picture) {
    this.#keep();
    this.context.imageSmoothingEnabled = !this.settings.isSharp;
    this.context.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    this.isEmpty = false;
    this.settings.onChange();
  }

  undo() {
    this.#swap(this.before, this.after);
  }

  redo() {
    this.#swap(this.after, this.before);
  }

  /** @returns {Promise<Blob>} the drawing as PNG */
  blob() {
    return new Promise((done, fail) => this.canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("The drawing could not be read."))), "image/png"));
  }

  /** @param {ImageData[]} from @param {ImageData[]} to */
  #swap(from, to) {
    const picture = from.pop();
    if (!picture) return;
    to.push(this.#all());
    this.context.putImageData(picture, 0, 0);
    this.isEmpty = false;
    this.settings.onChange();
  }

  #all() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  #keep() {
    this.before.push(this.#all());
    if (this.before.length > MOST_UNDO) this.before.shift();
    this.after = [];
  }

  /** The pixel below a pointer. @param {PointerEvent} event */
  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  /** @param {PointerEvent} event */
  #down(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    const { x, y } = this.#at(event);
    const { tool } = this.settings;
    const [px, py] = [Math.min(this.canvas.width - 1, Math.max(0, Math.floor(x))), Math.min(this.canvas.height - 1, Math.max(0, Math.floor(y)))];
    if (tool === "pick") {
      const [r, g, b] = this.context.getImageData(px, py, 1, 1).data;
      this.settings.onPick(`#${[r, g, b].map((value) => value.toString(16).padStart(2, "0")).join("")}`);
      return;
    }
    this.#keep();
    if (tool === "fill") {
      const all = this.#all();
      flood(all.data, all.width, all.height, px, py, rgb(this.settings.colour));
      this.context.putImageData(all, 0, 0);
      this.#changed();
      return;
    }
    this.last = { x, y };
    this.start = tool === "line" ? this.#all() : null;
    this.#draw({ x, y }, event.pressure);
  }

  /** @param {PointerEvent} event */
  #move(event) {
    if (!this.last) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) this.#draw(this.#at(one), one.pressure);
  }

  #up() {
    this.last = this.start = null;
  }

  /** @param {{x: number, y: number}} to @param {number} pressure 0 to 1; 0.5 for a mouse */
  #draw(to, pressure) {
    const { tool, colour, ground, size } = this.settings;
    const { context } = this;
    const last = /** @type {{x: number, y: number}} */ (this.last);
    if (this.start) context.putImageData(this.start, 0, 0);
    context.strokeStyle = tool === "eraser" ? ground : colour;
    context.lineWidth = this.start ? size : Math.max(1, size * 2 * (pressure || 0.5));
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(last.x, last.y);
    context.lineTo(to.x + 0.01, to.y);
    context.stroke();
    if (!this.start) this.last = to;
    this.#changed();
  }

  #changed() {
    this.isEmpty = false;
    this.settings.onChange();
  }
}
