// The mask of an edit: what is painted on the canvas is generated, the rest is kept.

const UNDO = 20;

export class Mask {
  /** @param source { width, height } of the input image, which the mask must have; `pixels` that were painted before. */
  constructor(canvas, { width, height, pixels }) {
    Object.assign(canvas, { width, height });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.stripes = this.context.createPattern(stripes(Math.max(8, Math.round(width / 24))), "repeat");
    this.whole = new Path2D(`M0 0H${width}V${height}H0Z`);
    this.before = []; // pixels before each of the last changes
    if (pixels) this.context.putImageData(pixels, 0, 0);
  }

  get pixels() {
    return this.context.getImageData(0, 0, this.context.canvas.width, this.context.canvas.height);
  }

  remember() {
    this.before = [...this.before.slice(1 - UNDO), this.pixels];
  }

  undo() {
    if (this.before.length) this.context.putImageData(this.before.pop(), 0, 0);
  }

  invert() {
    this.remember();
    this.fill("xor", "#000");
    this.fill("source-atop", this.stripes);
  }

  clear() {
    this.remember();
    this.fill("destination-out", "#000");
  }

  /** Paint from one point to another. */
  line(from, to, brush) {
    const [dx, dy] = [to.x - from.x, to.y - from.y];
    const steps = Math.max(1, Math.ceil(Math.hypot(dx, dy) / Math.max(1, brush.size / 8)));
    for (let step = 1; step <= steps; step++) this.dot(from.x + (dx * step) / steps, from.y + (dy * step) / steps, brush);
  }

  dot(x, y, { size, softness, erase }) {
    const radius = size / 2;
    const gradient = this.context.createRadialGradient(x, y, radius * (1 - softness) * 0.999, x, y, radius);
    gradient.addColorStop(0, "#000");
    gradient.addColorStop(1, "#0000");
    const circle = new Path2D();
    circle.arc(x, y, radius, 0, 2 * Math.PI);
    this.fill(erase ? "destination-out" : "source-over", softness === 0 ? "#000" : gradient, circle);
    this.fill("source-atop", this.stripes, circle); // the color alone: what is painted stays as opaque as it is
  }

  fill(operation, style, path = this.whole) {
    Object.assign(this.context, { globalCompositeOperation: operation, fillStyle: style });
    this.context.fill(path);
  }

  /** A promise of the mask as the API has it: transparent pixels are generated. Null if nothing is painted. */
  toBlob() {
    const { width, height, data } = this.pixels;
    if (!data.some(Boolean)) return null;
    const context = new OffscreenCanvas(width, height).getContext("2d");
    context.fill(this.whole);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.context.canvas, 0, 0);
    return context.canvas.convertToBlob({ type: "image/png" });
  }
}

/** A tile of dark and light stripes, which are seen on every image. */
function stripes(side) {
  const context = new OffscreenCanvas(side, side).getContext("2d");
  const half = side / 2;
  context.fillStyle = "#4f46e5";
  context.fillRect(0, 0, side, side);
  context.fillStyle = "#fff";
  context.fill(new Path2D(`M0 0H${half}L0 ${half}Z M${side} 0V${half}L${half} ${side}H0Z`));
  return context.canvas;
}
