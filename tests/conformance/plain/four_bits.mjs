// A base in four bits: L11.

import { tensor } from "./arrays.mjs";
import { lora_linear } from "./lora.mjs";

const f = Math.fround; // whatever else is computed in
const nearest = (x, numbers) => {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (Math.abs(x - numbers[i]) < Math.abs(x - numbers[best])) best = i;
  return best;
};
const maxima = (d, size) => Array.from({ length: Math.ceil(d.length / size) }, (_, i) => {
  let most = 0;
  for (let j = i * size; j < Math.min(d.length, (i + 1) * size); j++) most = Math.max(most, Math.abs(d[j]));
  return most;
});
const list = (a) => tensor([a.length], a);

export function quantise_nf4(t, c) {
  const w = t.W.d, a = maxima(w, c.block), codes = [];
  const k = Array.from(w, (x, i) => nearest(f(x / (a[Math.floor(i / c.block)] || 1)), t.levels.d));
  for (let i = 0; i < k.length; i += 2) codes.push(16 * k[i] + k[i + 1]);
  if (!t.map) return { codes: list(codes), absmax: list(a) };
  const offset = f(a.reduce((sum, x) => f(sum + x), 0) / a.length), left = a.map((x) => f(x - offset)), outer = maxima(left, 256);
  const absmax = left.map((x, i) => nearest(f(x / outer[Math.floor(i / 256)]), t.map.d));
  return { codes: list(codes), absmax: list(absmax), outer: list(outer), offset: tensor([], [offset]) };
}
export function dequantise_nf4(t, c) {
  const a = Array.from(t.absmax.d, (x, i) => t.map ? f(f(t.map.d[x] * t.outer.d[Math.floor(i / 256)]) + t.offset.d[0]) : x);
  const numbers = Array.from({ length: c.out * c.in }, (_, i) => {
    const byte = t.codes.d[i >> 1], k = i % 2 ? byte & 15 : byte >> 4;
    return f(t.levels.d[k] * a[Math.floor(i / c.block)]);
  });
  return { W: tensor([c.out, c.in], numbers) };
}
export function nf4_linear(t, c) {
  return lora_linear({ ...t, W0: dequantise_nf4(t, c).W }, c);
}
