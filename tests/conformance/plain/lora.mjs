// LoRA: L1 to L9.

import { T, add, at, cols, f, flat, linear, map, mm, mul, row, scatter, take, tensor, times } from "./arrays.mjs";
import { directions } from "./singular.mjs";

export const scale = (c) => c.alpha / (c.rslora ? Math.sqrt(c.r) : c.r);
export const maskOf = (t, c) => t.keep && tensor(t.keep.shape, t.keep.d.map((k) => k * f(1 / (1 - c.p))));
export const lora_update = (t, c) => ({ s: tensor([], [scale(c)]), dW: times(mm(t.B, t.A), scale(c)) });

export function lora_linear(t, c) {
  const m = maskOf(t, c), x = m ? mul(t.x, m) : t.x, s = scale(c);
  const u = times(mm(x, T(t.A)), s), h = add(linear(t.x, t.W0, t.b), mm(u, T(t.B)));
  if (!t.dh) return { h };
  const v = times(mm(t.dh, t.B), s), low = mm(v, t.A);
  return { h, d: { x: add(mm(t.dh, t.W0), m ? mul(low, m) : low), A: mm(T(v), flat(x)), B: mm(T(t.dh), flat(u)) } };
}
export function lora_start(t, c) {
  const result = lora_linear(t, c), base = linear(t.x, t.W0, t.b);
  return { ...result, difference: map((x, y) => f(x - y), result.h, base) };
}
export function lora_embedding(t, c) {
  const u = times(take(T(t.A), t.tokens), scale(c)), v = times(mm(t.dh, t.B), scale(c));
  const d = { A: T(scatter(v, t.tokens, T(t.A))), B: mm(T(t.dh), flat(u)) };
  return { h: add(take(t.E, t.tokens), mm(u, T(t.B))), d };
}
export function rounded(x, bits) { // to so many significant bits, ties to even
  if (x === 0) return x;
  const unit = 2 ** (Math.floor(Math.log2(Math.abs(x))) + 1 - bits), n = x / unit, low = Math.floor(n);
  return (n - low < 0.5 || (n - low === 0.5 && low % 2 === 0) ? low : low + 1) * unit;
}
export function merged(W0, A, B, r, s, dtype) { // summed in float64
  const bits = { float32: 24, float16: 11, bfloat16: 8 }[dtype];
  return tensor(W0.shape, Array.from(W0.d, (w, i) => {
    const [o, n] = [Math.floor(i / cols(W0)), i % cols(W0)];
    let sum = 0;
    for (let k = 0; k < r; k++) sum += at(B, o, k) * at(A, k, n);
    return rounded(w + s * sum, bits);
  }));
}
export function merge(t, c) {
  const W = merged(t.W0, t.A, t.B, c.r, scale(c), c.dtype);
  return { W, h: linear(t.x, W, t.b) };
}
export function segments(t, c) {
  const y = tensor(t.y.shape, t.y.d), [, out, R] = t.B.shape, inside = cols(t.x);
  t.index.d.forEach((i, m) => {
    if (i < 0) return;
    const { r } = c.adapters[i], B = (o, k) => t.B.d[(i * out + o) * R + k];
    const A = tensor([r, inside], t.A.d.subarray(i * R * inside, (i * R + r) * inside));
    const u = mm(tensor([1, inside], row(t.x, m)), T(A));
    const low = times(mm(u, T(tensor([out, r], Array.from({ length: out * r }, (_, j) => B(Math.floor(j / r), j % r))))), scale(c.adapters[i]));
    low.d.forEach((v, o) => (row(y, m)[c.start + o] = f(row(y, m)[c.start + o] + v)));
  });
  return { y };
}
export function per_row(t, c) {
  const parts = c.adapters.map((one, i) => times(mm(mm(t.x, T(t[`A${i}`])), T(t[`B${i}`])), scale(one)));
  const base = linear(t.x, t.W0, t.b), each = base.d.length / t.rows.d.length;
  const h = Array.from(base.d, (x, i) => {
    const of = t.rows.d[Math.floor(i / each)];
    return of < 0 ? x : f(x + parts[of].d[i]);
  });
  return { h: tensor(base.shape, h) };
}
export const unmerge = (t) => ({ W0: t.W0 }); // the base was kept
export function combine(t, c) {
  const dW = c.adapters.map((one, i) => times(mm(t[`B${i}`], t[`A${i}`]), one.w * scale(one))).reduce(add);
  if (c.rank === null) return { dW };
  const V = directions(dW, c.rank);
  return { dW: mm(mm(dW, T(V)), V) };
}
export const count = (t) => ({
  parameters: { shape: [], d: [t.r.d.reduce((s, r, i) => s + t.matrices.d[i] * r * (t.out.d[i] + t.in.d[i]), 0)] },
});
