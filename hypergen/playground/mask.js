// The mask of an edit: what is painted on the canvas is generated, the rest is kept.

const UNDO = 20;

export class Mask {
  /**
   * @param source { width, height } of the input image, which the mask must have; `pixels` that were painted before.
   * @param onChange called after each stroke.
   */
  constructor(canvas, { width, height, pixels }, onChange) {
    Object.assign(canvas, { width, height });
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    if (pixels) this.context.putImageData(pixels, 0, 0);
    this.stripes = this.context.createPattern(stripes(Math.max(8, Math.round(width / 24))), "repeat");
    this.onChange = onChange;
    this.before = []; // pixels before each of the last strokes
    this.isPainting = false;
    this.cursor = { x: width / 2, y: height / 2 }; // of the brush, in pixels of the image
  }

  start(event, brush) {
    this.remember();
    this.isPainting = true;
    this.cursor = this.position(event);
    this.paint(this.cursor, brush);
  }

  /** Follow the pointer, and paint if a stroke was started. */
  draw(event, brush) {
    const to = this.position(event);
    const { x, y } = this.cursor;
    this.cursor = to;
    if (!this.isPainting) return;
    const steps = Math.ceil(Math.hypot(to.x - x, to.y - y) / Math.max(1, brush.size / 8));
    for (let step = 1; step <= steps; step++) {
      this.paint({ x: x + ((to.x - x) * step) / steps, y: y + ((to.y - y) * step) / steps }, brush);
    }
  }

  end() {
    if (this.isPainting) this.onChange();
    this.isPainting = false;
  }

  /** Paint once at the cursor. */
  dab(brush) {
    this.remember();
    this.paint(this.cursor, brush);
    this.onChange();
  }

  move(x, y) {
    const within = (value, most) => Math.max(0, Math.min(most, value));
    this.cursor = { x: within(this.cursor.x + x, this.canvas.width), y: within(this.cursor.y + y, this.canvas.height) };
  }

  invert() {
    this.remember();
    this.fill("xor", "#000", this.whole());
    this.fill("source-atop", this.stripes, this.whole());
    this.onChange();
  }

  undo() {
    const pixels = this.before.pop();
    if (!pixels) return;
    this.context.putImageData(pixels, 0, 0);
    this.onChange();
  }

  clear() {
    this.remember();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.onChange();
  }

  /** A promise of the mask as the API has it: transparent pixels are generated. Null if nothing is painted. */
  toBlob() {
    const pixels = this.pixels();
    let painted = false;
    for (let at = 3; at < pixels.data.length; at += 4) {
      painted ||= pixels.data[at] > 0;
      pixels.data[at] = 255 - pixels.data[at];
    }
    if (!painted) return null;
    const mask = new OffscreenCanvas(pixels.width, pixels.height);
    mask.getContext("2d").putImageData(pixels, 0, 0);
    return mask.convertToBlob({ type: "image/png" });
  }

  pixels() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  position({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    return { x: ((clientX - box.left) / box.width) * this.canvas.width, y: ((clientY - box.top) / box.height) * this.canvas.height };
  }

  paint({ x, y }, { size, softness, erase }) {
    const radius = size / 2;
    const gradient = this.context.createRadialGradient(x, y, radius * (1 - softness) * 0.999, x, y, radius);
    gradient.addColorStop(0, "#000");
    gradient.addColorStop(1, "#0000");
    const circle = new Path2D();
    circle.arc(x, y, radius, 0, 2 * Math.PI);
    this.fill(erase ? "destination-out" : "source-over", softness === 0 ? "#000" : gradient, circle);
    this.fill("source-atop", this.stripes, circle); // the color alone: what is painted stays as opaque as it is
  }

  fill(operation, style, path) {
    Object.assign(this.context, { globalCompositeOperation: operation, fillStyle: style });
    this.context.fill(path);
  }

  whole() {
    const path = new Path2D();
    path.rect(0, 0, this.canvas.width, this.canvas.height);
    return path;
  }

  remember() {
    this.before.push(this.pixels());
    if (this.before.length > UNDO) this.before.shift();
  }
}

/** A tile of dark and light stripes, which are seen on every image. */
function stripes(side) {
  const tile = new OffscreenCanvas(side, side);
  const context = tile.getContext("2d");
  context.fillStyle = "#4f46e5";
  context.fillRect(0, 0, side, side);
  context.fillStyle = "#fff";
  const half = side / 2;
  context.fill(new Path2D(`M0 0H${half}L0 ${half}Z M${side} 0V${half}L${half} ${side}H0Z`));
  return tile;
}
