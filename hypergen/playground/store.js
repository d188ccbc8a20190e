// The images of this browser, in IndexedDB: { id, created, blob, body, seed, model, size, understood, ms, source }.

const NAME = "images";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("hypergen", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(NAME, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, action) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(NAME, mode);
      const request = action(transaction.objectStore(NAME));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
    });
  } finally {
    database.close();
  }
}

/** All images, newest first. */
export async function loadImages() {
  return (await run("readonly", (images) => images.getAll())).sort((a, b) => b.created - a.created);
}

/** Throws a QuotaExceededError if the disk is full. */
export const saveImage = (image) => run("readwrite", (images) => images.put(image));
export const deleteImage = (id) => run("readwrite", (images) => images.delete(id));
export const deleteImages = () => run("readwrite", (images) => images.clear());

const urls = new WeakMap();

/** An address of the image for `<img>`, the same each time. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

export const extensionOf = (blob) => ({ "image/jpeg": "jpg", "image/webp": "webp" })[blob.type] ?? "png";

export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: urlOf(blob), download: name });
  link.click();
}

export async function toDataUrl(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let binary = "";
  for (let at = 0; at < bytes.length; at += 32768) binary += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return `data:${blob.type || "image/png"};base64,${btoa(binary)}`;
}
