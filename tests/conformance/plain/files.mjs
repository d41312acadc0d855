// Safetensors files: 8 bytes, the length of a header in JSON; the header; the tensors' bytes.

import fs from "node:fs";
import { Floats, dtype } from "./arrays.mjs";

const ARRAYS = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array, BOOL: Uint8Array };

export function readTensors(file) {
  const bytes = fs.readFileSync(file);
  const length = Number(bytes.readBigUInt64LE(0));
  const tensors = {};
  for (const [name, entry] of Object.entries(JSON.parse(bytes.subarray(8, 8 + length).toString()))) {
    if (name === "__metadata__") continue;
    const [start, end] = entry.data_offsets.map((place) => place + 8 + length);
    const data = new ARRAYS[entry.dtype](bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + end));
    tensors[name] = { shape: entry.shape, d: entry.dtype.startsWith("F") ? Floats.from(data) : [...data].map(Number) };
  }
  return tensors;
}

export function writeTensors(file, tensors) {
  const header = {}, parts = [];
  let start = 0;
  for (const [name, { shape, d }] of Object.entries(tensors)) {
    const whole = !(d instanceof Floats);
    const data = whole ? BigInt64Array.from(d, BigInt) : d;
    const type = whole ? "I64" : dtype === "float64" ? "F64" : "F32";
    header[name] = { dtype: type, shape, data_offsets: [start, (start += data.byteLength)] };
    parts.push(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(file, Buffer.concat([length, text, ...parts]));
}
