// DoRA and PiSSA: L10, L12.

import { T, add, cols, f, flat, linear, map, mm, mul, perRow, plusBias, row, rows, scatter, take, tensor, times, total } from "./arrays.mjs";
import { maskOf, scale } from "./lora.mjs";
import { directions, dot } from "./singular.mjs";

const minus = (a, b) => map((x, y) => f(x - y), a, b);
const by = (a, v) => perRow(a, (r) => r.map((x, j) => f(x * v.d[j]))); // each column by its number
const over = (a, b) => map((x, y) => f(x / y), a, b);
const moved = (t, c) => add(t.W0, times(mm(t.B, t.A), scale(c))); // W0 + s B A
const norms = (V) => tensor([rows(V)], Array.from({ length: rows(V) }, (_, i) => f(Math.sqrt(dot(row(V, i), row(V, i))))));

export function dora_linear(t, c) {
  const V = moved(t, c), n = norms(V), g = over(t.m, n), m = maskOf(t, c), x = m ? mul(t.x, m) : t.x;
  const z = mm(x, T(V)), part = m ? linear(minus(t.x, x), t.W0) : null;
  const h = plusBias(part ? add(by(z, g), part) : by(z, g), t.b);
  const dz = by(t.dh, g), s = scale(c), dV = mm(T(dz), flat(x)), dx = mm(dz, V), base = mm(t.dh, t.W0);
  const d = { A: times(mm(T(t.B), dV), s), B: times(mm(dV, T(t.A)), s), m: over(total(mul(t.dh, z)), n) };
  return { h, d: { ...d, x: m ? add(mul(minus(dx, base), m), base) : dx } };
}
export function dora_embedding(t, c) {
  const E = add(t.E, times(mm(T(t.A), T(t.B)), scale(c))), n = norms(T(E)), g = over(t.m, n), z = take(E, t.tokens);
  const dE = scatter(by(t.dh, g), t.tokens, E), s = scale(c);
  return { h: by(z, g), d: { A: times(T(mm(dE, t.B)), s), B: times(mm(T(dE), T(t.A)), s), m: over(total(mul(t.dh, z)), n) } };
}
export function dora_merge(t, c) {
  const V = moved(t, c), g = over(t.m, norms(V));
  return { W: tensor(V.shape, V.d.map((x, i) => f(x * g.d[Math.floor(i / cols(V))]))) };
}
export function pissa(t, c) {
  const V = directions(t.W0, c.r), update = mm(mm(t.W0, T(V)), V);
  return { update, residual: minus(t.W0, update) };
}
