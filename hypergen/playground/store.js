// The images of this browser, in IndexedDB: { id, created, blob, body, seed, model, size, understood, ms, source }.
import { clear, createStore, del, set, values } from "./vendor/idb-keyval.js";

const store = createStore("hypergen.playground", "images");

/** All images, newest first. */
export const loadImages = async () => (await values(store)).sort((a, b) => b.created - a.created);
/** Throws a QuotaExceededError if the disk is full. */
export const saveImage = async (image) => set(image.id, image, store);
export const deleteImage = (id) => del(id, store);
export const deleteImages = () => clear(store);

const urls = new WeakMap();

/** An address of the image for `<img>`, the same each time. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

export function download(blob, name) {
  Object.assign(document.createElement("a"), { href: urlOf(blob), download: name }).click();
}

export function toDataUrl(blob) {
  const reader = new FileReader();
  return new Promise((resolve, reject) => {
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
