// The transformer's primitives, forward and backward: T1 to T12, T15, T16.

import {
  T, add, at, cols, f, flat, linear as affine, map, mm, mul, perRow, plusBias, row, scatter, sum, take, tensor, times,
  total, zeros,
} from "./arrays.mjs";
import { maskOf } from "./lora.mjs";

export function embedding(t) {
  const parts = ["tokens", "positions", "types"].filter((name) => t[name]), d = {};
  const each = t.tokens.d.length / t.tokens.shape[0];
  const index = (name) => // (N, T)
    name === "positions" ? { shape: t.tokens.shape, d: t.tokens.d.map((_, i) => t.positions.d[i % each]) } : t[name];
  for (const name of parts) d[`${name}_table`] = scatter(t.dx, index(name), t[`${name}_table`]);
  return { x: parts.map((name) => take(t[`${name}_table`], index(name))).reduce(add), d };
}
export const linear = (t) => ({
  y: affine(t.x, t.W, t.b), d: { x: mm(t.dy, t.W), W: mm(T(t.dy), flat(t.x)), b: total(t.dy) },
});
const norm = (centred) => (t, c) => {
  const mean = (xs) => f(sum(xs) / xs.length), less = (xs) => (centred ? xs.map((x) => f(x - mean(xs))) : xs);
  const rstd = (xs) => f(1 / f(Math.sqrt(f(mean(less(xs).map((x) => f(x * x))) + f(c.eps)))));
  const xhat = perRow(t.x, (xs) => less(xs).map((x) => f(x * rstd(xs))));
  const g = perRow(t.dy, (ds) => ds.map((x, j) => f(x * t.w.d[j])));
  const x = perRow(g, (gs, i) => {
    const along = mean(gs.map((v, j) => f(v * row(xhat, i)[j]))), out = less(gs);
    return out.map((v, j) => f(f(v - f(row(xhat, i)[j] * along)) * rstd(row(t.x, i))));
  });
  return { y: plusBias(perRow(xhat, (r) => r.map((v, j) => f(v * t.w.d[j]))), t.b),
    d: { x, w: total(mul(t.dy, xhat)), b: total(t.dy) } };
};
function erf(x) { // in float64: a series near 0, and a continued fraction of erfc beyond
  const a = Math.abs(x), c = 2 / Math.sqrt(Math.PI);
  let y = 0;
  if (a < 2.5) for (let n = 0, term = a; n < 80; n++, term *= (-a * a) / n) y += (c * term) / (2 * n + 1);
  else {
    for (let n = 60; n > 0; n--) y = n / 2 / (a + y);
    y = 1 - Math.exp(-a * a) / Math.sqrt(Math.PI) / (a + y);
  }
  return Math.sign(x) * y;
}
const elementwise = (fn) => (t) => { // fn(x) -> y, dy/dx
  return { y: map((x) => fn(x)[0], t.x), d: { x: map((x, dy) => f(dy * fn(x)[1]), t.x, t.dy) } };
};
const geluAt = (x) => {
  const P = f(f(1 + f(erf(f(x * f(Math.SQRT1_2))))) / 2);
  return [f(x * P), f(P + f(x * f(Math.exp(f(-x * x) / 2) / Math.sqrt(2 * Math.PI))))];
};
const geluTanhAt = (x) => {
  const c = f(Math.sqrt(2 / Math.PI)), k = f(0.044715), x2 = f(x * x);
  const P = f(f(1 + f(Math.tanh(f(c * f(x + f(k * f(x * x2))))))) / 2);
  return [f(x * P), f(P + f(f(2 * f(x * f(P * f(1 - P)))) * f(c * f(1 + f(f(3 * k) * x2)))))];
};
const siluAt = (x) => {
  const S = f(1 / f(1 + f(Math.exp(-x))));
  return [f(x * S), f(S + f(f(x * S) * f(1 - S)))];
};
export const [layer_norm, rms_norm] = [norm(true), norm(false)];
export const [gelu, gelu_tanh, silu] = [geluAt, geluTanhAt, siluAt].map(elementwise);
export function gated_mlp(t) {
  const gate = affine(t.x, t.W_gate), up = affine(t.x, t.W_up), act = map((x) => siluAt(x)[0], gate), h = mul(act, up);
  const dh = mm(t.dy, t.W_down), dGate = map((g, x, u) => f(f(g * u) * siluAt(x)[1]), dh, gate, up), dUp = mul(dh, act);
  const d = { W_gate: mm(T(dGate), flat(t.x)), W_up: mm(T(dUp), flat(t.x)), W_down: mm(T(t.dy), flat(h)) };
  return { y: affine(h, t.W_down), d: { ...d, x: add(mm(dGate, t.W_gate), mm(dUp, t.W_up)) } };
}
function softmaxRow(xs, sees) {
  const max = Math.max(...xs.filter((_, j) => sees(j)));
  const e = xs.map((x, j) => (sees(j) ? f(Math.exp(f(x - max))) : 0)), s = sum(e);
  return e.map((x) => (s === 0 ? 0 : f(x / s)));
}
function softmaxRowBackward(p, dp) {
  const along = sum(p.map((x, j) => f(x * dp[j])));
  return p.map((x, j) => f(x * f(dp[j] - along)));
}
export function softmax(t) {
  const p = perRow(t.x, (xs, i) => softmaxRow(xs, (j) => at(t.mask, i, j)));
  return { p, d: { x: perRow(p, (ps, i) => softmaxRowBackward(ps, row(t.dp, i))) } };
}
export function attention(t, c) {
  const [N, H, n, K] = t.q.shape, [, G, S] = t.k.shape;
  const y = zeros(t.q.shape), d = { q: zeros(t.q.shape), k: zeros(t.k.shape), v: zeros(t.v.shape) };
  const part = (a, i, h) => {
    const size = a.shape[2] * K, start = (i * a.shape[1] + h) * size;
    return { shape: [a.shape[2], K], d: a.d.subarray(start, start + size) };
  };
  const put = (a, value) => value.d.forEach((x, j) => (a.d[j] = f(a.d[j] + x)));
  for (let i = 0; i < N; i++)
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G)), [q, dy] = [t.q, t.dy].map((a) => part(a, i, h));
      const [k, v] = [t.k, t.v].map((a) => part(a, i, g)), s = 1 / Math.sqrt(K);
      const sees = (query) => (key) => (!t.mask || at(t.mask, i, key)) && (!c.causal || key <= S - n + query);
      const p = perRow(times(mm(q, T(k)), s), (xs, query) => softmaxRow(xs, sees(query)));
      const ds = times(perRow(mm(dy, T(v)), (dp, query) => softmaxRowBackward(row(p, query), dp)), s);
      put(part(y, i, h), mm(p, v));
      put(part(d.q, i, h), mm(ds, k));
      put(part(d.k, i, g), mm(T(ds), q));
      put(part(d.v, i, g), mm(T(p), dy));
    }
  return { y, d };
}
function turned(x, positions, theta, sign) {
  const [, H, n, K] = x.shape;
  return perRow(x, (xs, i) => {
    const place = positions.shape.length === 1 ? i % n : Math.floor(i / (H * n)) * n + (i % n);
    return xs.map((v, j) => {
      const angle = positions.d[place] * theta ** ((-2 * (j % (K / 2))) / K), other = xs[(j + K / 2) % K];
      return f(f(v * f(Math.cos(angle))) + f((j < K / 2 ? -sign : sign) * f(other * f(Math.sin(angle)))));
    });
  });
}
export const rotary = (t, c) => ({
  y: turned(t.x, t.positions, c.theta, 1), d: { x: turned(t.dy, t.positions, c.theta, -1) },
});
export const dropout = (t, c) => ({ y: mul(t.x, maskOf(t, c)), d: { x: mul(t.dy, maskOf(t, c)) } });
export function cross_entropy(t) {
  const counts = t.targets.d.map((target) => target !== -100), n = counts.filter(Boolean).length, losses = [];
  const logits = perRow(t.logits, (xs, i) => {
    if (!counts[i]) return xs.map(() => 0);
    const max = Math.max(...xs), target = t.targets.d[i];
    losses.push(f(f(Math.log(sum(xs.map((x) => f(Math.exp(f(x - max))))))) - f(xs[target] - max)));
    return softmaxRow(xs, () => true).map((p, j) => f(f(p - (j === target ? 1 : 0)) / n));
  });
  return { loss: tensor([], [f(sum(losses) / n)]), d: { logits } };
}
export function sample(t, c) {
  const share = (p) => { const s = p.reduce((a, b) => a + b, 0); return p.map((x) => x / s); };
  const tokens = Array.from(t.u.d, (u, i) => {
    const xs = row(t.logits, i), order = [...xs.keys()].sort((a, b) => xs[b] - xs[a]);
    let p = share(order.map((j, k) => (c.top_k && k >= c.top_k ? 0 : Math.exp((xs[j] - xs[order[0]]) / c.temperature))));
    let before = 0, reached = 0;
    if (c.top_p) p = share(p.map((x) => (before < c.top_p ? ((before += x), x) : 0)));
    return order[p.findIndex((x) => (reached += x) >= u)];
  });
  return { tokens: { shape: t.u.shape, d: tokens } };
}
