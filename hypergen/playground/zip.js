// A zip file without compression, because images are compressed already.
// Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.

const CRCS = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = (crc >>> 8) ^ CRCS[(crc ^ byte) & 255];
  return (crc ^ 0xffffffff) >>> 0;
}

/** Little-endian integers: [bytes, value] each. */
function pack(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [bytes]) => sum + bytes, 0)));
  let at = 0;
  for (const [bytes, value] of fields) {
    if (bytes === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += bytes;
  }
  return view.buffer;
}

function dosTime(date) {
  const day = ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  return [(date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1), day];
}

/** A zip of files { name, blob, date }; reads one file at a time. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, blob, date } of files) {
    const path = new TextEncoder().encode(name);
    const crc = crc32(new Uint8Array(await blob.arrayBuffer()));
    const [time, day] = dosTime(date);
    // Version 2.0, UTF-8 names (bit 11), method 0: stored.
    const common = [[2, 20], [2, 0x800], [2, 0], [2, time], [2, day], [4, crc], [4, blob.size], [4, blob.size]];
    const local = pack([4, 0x04034b50], ...common, [2, path.length], [2, 0]);
    const central = pack([4, 0x02014b50], [2, 20], ...common, [2, path.length], [4, 0], [4, 0], [4, 0], [4, offset]);
    parts.push(local, path, blob);
    directory.push(central, path);
    offset += local.byteLength + path.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const end = pack([4, 0x06054b50], [4, 0], [2, files.length], [2, files.length], [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
