// The large view of one image: zoom, comparison with another, its settings, and what to do with it.
import Panzoom from "./vendor/panzoom.js";
import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { setSource } from "./edit.js";
import { toSettings } from "./fields.js";
import { useSettings } from "./form.js";
import { nameOf } from "./gallery.js";
import { axisKinds, startGrid } from "./grid.js";
import { app, update } from "./state.js";
import { deleteImage, download, urlOf } from "./store.js";
import { text } from "./text.js";
import { Dialog, IconButton, Select, Slider, keyHandler } from "./ui.js";

const { viewer } = text;
const MOST_SCALE = 32;
const MOST_COMPARED = 50;
const PAN = 60; // pixels per key
const SAME_SEED = ["guidance_scale", "num_inference_steps", "sampler", "lora"]; // what else may change

export function Viewer() {
  const { images, viewed } = app;
  const [scale, setScale] = useState(1);
  const panzoom = useRef();
  const [comparedId, setCompared] = useState("");
  const index = images.findIndex(({ id }) => id === viewed);
  const image = images[index];
  if (!image) return null;
  const compared = comparedId === "source" ? image.source : images.find(({ id }) => id === comparedId)?.blob;
  const fit = () => panzoom.current.reset();
  const show = (step) => images[index + step] && (fit(), update({ viewed: images[index + step].id }));
  const [zoomIn, zoomOut] = [1.5, 1 / 1.5].map((factor) => () => panzoom.current.zoom(scale * factor));
  const pan = (x, y) => panzoom.current.pan((-x * PAN) / scale, (-y * PAN) / scale, { relative: true });
  const move = (x, y) => (scale > 1 ? pan(x, y) : show(x));
  const onKeyDown = keyHandler(move, { "+": zoomIn, "=": zoomIn, "-": zoomOut, 0: fit });
  const others = images.filter((other) => other !== image).slice(0, MOST_COMPARED);
  const choices = [
    ["", viewer.compareNone],
    ...(image.source ? [["source", viewer.compareSource]] : []),
    ...others.map(({ id, body, seed }) => [id, `${body.prompt.slice(0, 40)}, ${seed}`]),
  ];
  return html`<${Dialog} title=${viewer.title} className="viewer" onKeyDown=${onKeyDown} onClose=${() => update({ viewed: null })}>
    <div class="body">
      <div class="stage-side">
        <${Stage} image=${image} compared=${compared} panzoom=${panzoom} scale=${scale} onScale=${setScale} />
        <div class="toolbar">
          <${IconButton} label=${viewer.previous} disabled=${index === 0} onClick=${() => show(-1)}>←<//>
          <${IconButton} label=${viewer.next} disabled=${index === images.length - 1} onClick=${() => show(1)}>→<//>
          <span class="space"></span>
          <${IconButton} label=${viewer.zoomOut} onClick=${zoomOut}>−<//>
          <button type="button" onClick=${fit}>${scale === 1 ? viewer.fit : `${Math.round(scale * 100)} %`}</button>
          <${IconButton} label=${viewer.zoomIn} onClick=${zoomIn}>+<//>
        </div>
      </div>
      <aside>
        <p class="prompt">${image.body.prompt}</p>
        ${image.understood && html`<p class="hint">${text.gallery.understood(image.understood)}</p>`}
        <${Facts} image=${image} />
        <label class="field"><span class="label">${viewer.compare}</span>
          <${Select} value=${comparedId} options=${choices} onChange=${setCompared} />
        </label>
        <${Actions} image=${image} next=${images[index + 1] ?? images[index - 1]} />
      </aside>
    </div>
  <//>`;
}

function Stage({ image, compared, panzoom, scale, onScale }) {
  const [divider, setDivider] = useState(50);
  const zoomed = useRef();
  useEffect(() => {
    panzoom.current = Panzoom(zoomed.current, { minScale: 1, maxScale: MOST_SCALE, contain: "outside", cursor: "grab" });
    zoomed.current.addEventListener("panzoomchange", ({ detail }) => onScale(detail.scale));
  }, []);
  const imageRendering = scale > 3 ? "pixelated" : "auto";
  const clipPath = `inset(0 ${100 - divider}% 0 0)`;
  return html`<div class="stage" onWheel=${(event) => panzoom.current.zoomWithWheel(event)}>
      <div class="zoomed" ref=${zoomed} style=${{ imageRendering }}>
        <img src=${urlOf(image.blob)} alt=${image.body.prompt} draggable=${false} />
        ${compared && html`<img class="over" src=${urlOf(compared)} alt="" draggable=${false} style=${{ clipPath }} />`}
      </div>
    </div>
    ${compared && html`<${Slider} label=${viewer.slider} min="0" max="100" value=${divider} onChange=${setDivider} />`}`;
}

function Facts({ image }) {
  const { prompt: _prompt, seed: _seed, n: _n, size: _size, model: _model, loras, ...body } = image.body;
  const { seed, size, model, ms } = image;
  const facts = { seed, size: size.replace("x", " × "), model, ...body, ...loras, [viewer.duration]: text.seconds(ms / 1000) };
  const row = ([name, value]) => html`<div><dt>${text.fields[name] ?? name}</dt><dd>${String(value)}</dd></div>`;
  return html`<dl>${Object.entries(facts).filter(([, value]) => value !== undefined).map(row)}</dl>`;
}

function Actions({ image, next }) {
  const settings = () => toSettings({ ...image.body, size: image.source ? (image.body.size ?? "") : image.size }, image.seed);
  const kinds = [["", viewer.sameSeed], ...axisKinds().filter(([kind]) => SAME_SEED.includes(kind))];
  const remove = async () => {
    update({ images: app.images.filter((other) => other !== image), viewed: next?.id ?? null });
    await deleteImage(image.id);
  };
  return html`<div class="actions column">
    <button type="button" class="primary" onClick=${() => useSettings(settings())}>${viewer.useSettings}</button>
    <button type="button" onClick=${() => setSource(image.blob)}>${viewer.useAsInput}</button>
    <${Select} aria-label=${viewer.sameSeed} options=${kinds} onChange=${(kind) => startGrid(kind, settings())} />
    <div class="row">
      <button type="button" onClick=${() => download(image.blob, nameOf(image))}>${viewer.download}</button>
      <button type="button" onClick=${remove}>${viewer.delete}</button>
    </div>
  </div>`;
}
