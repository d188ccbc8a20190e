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

/** An integer of four bytes as two of two bytes, little-endian, as browsers keep them. */
const four = (value) => [value & 0xffff, value >>> 16];

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
    const common = [20, 0x800, 0, time, day, ...four(crc), ...four(blob.size), ...four(blob.size), path.length, 0];
    parts.push(Uint16Array.of(...four(0x04034b50), ...common), path, blob);
    directory.push(Uint16Array.of(...four(0x02014b50), 20, ...common, 0, 0, 0, ...four(0), ...four(offset)), path);
    offset += 2 * (2 + common.length) + path.length + blob.size;
  }
  const { size } = new Blob(directory);
  const count = files.length;
  const end = Uint16Array.of(...four(0x06054b50), 0, 0, count, count, ...four(size), ...four(offset), 0);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
