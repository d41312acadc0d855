// The transformer's primitives, forward and backward: T1 to T12, T15 to T20.

import {
  T, add, at, cols, f, flat, linear as affine, map, mm, mul, perRow, plusBias, row, scatter, sum, take, tensor, times,
  total, zeros,
} from "./arrays.mjs";
import { maskOf } from "./lora.mjs";

export function embedding(t, c) {
  const parts = ["tokens", "positions", "types"].filter((name) => t[name]), d = {};
  const each = t.tokens.d.length / t.tokens.shape[0];
  const index = (name) => // (N, T)
    name === "positions" ? { shape: t.tokens.shape, d: t.tokens.d.map((_, i) => t.positions.d[i % each]) } : t[name];
  const scaled = (name, x) => (name === "tokens" && c.scale ? times(x, c.scale) : x);
  for (const name of parts) d[`${name}_table`] = scatter(scaled(name, t.dx), index(name), t[`${name}_table`]);
  return { x: parts.map((name) => scaled(name, take(t[`${name}_table`], index(name)))).reduce(add), d };
}
export const linear = (t) => ({
  y: affine(t.x, t.W, t.b), d: { x: mm(t.dy, t.W), W: mm(T(t.dy), flat(t.x)), b: total(t.dy) },
});
const norm = (centred) => (t, c) => {
  const mean = (xs) => f(sum(xs) / xs.length), less = (xs) => (centred ? xs.map((x) => f(x - mean(xs))) : xs);
  const rstd = (xs) => f(1 / f(Math.sqrt(f(mean(less(xs).map((x) => f(x * x))) + f(c.eps)))));
  const xhat = perRow(t.x, (xs) => less(xs).map((x) => f(x * rstd(xs))));
  const w = c.one_plus ? map((x) => f(1 + x), t.w) : t.w;
  const g = perRow(t.dy, (ds) => ds.map((x, j) => f(x * w.d[j])));
  const x = perRow(g, (gs, i) => {
    const along = mean(gs.map((v, j) => f(v * row(xhat, i)[j]))), out = less(gs);
    return out.map((v, j) => f(f(v - f(row(xhat, i)[j] * along)) * rstd(row(t.x, i))));
  });
  return { y: plusBias(perRow(xhat, (r) => r.map((v, j) => f(v * w.d[j]))), t.b),
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
const reluAt = (x) => [Math.max(x, 0), x > 0 ? 1 : 0];
const activations = { gelu: geluAt, gelu_tanh: geluTanhAt, silu: siluAt, relu: reluAt };
export const [gelu, gelu_tanh, silu, relu] = Object.values(activations).map(elementwise);
export function gated_mlp(t, c) {
  const actAt = activations[c.activation ?? "silu"], gate = affine(t.x, t.W_gate), up = affine(t.x, t.W_up);
  const act = map((x) => actAt(x)[0], gate), h = mul(act, up);
  const dh = mm(t.dy, t.W_down), dGate = map((g, x, u) => f(f(g * u) * actAt(x)[1]), dh, gate, up), dUp = mul(dh, act);
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
      const [k, v] = [t.k, t.v].map((a) => part(a, i, g)), s = c.scale ?? 1 / Math.sqrt(K);
      const sees = (query) => (key) => (!t.mask || at(t.mask, i, key)) && (!c.causal || key <= S - n + query) &&
        (!c.window || key > S - n + query - c.window);
      const p = perRow(times(mm(q, T(k)), s), (xs, query) => softmaxRow(xs, sees(query)));
      const ds = times(perRow(mm(dy, T(v)), (dp, query) => softmaxRowBackward(row(p, query), dp)), s);
      put(part(y, i, h), mm(p, v));
      put(part(d.q, i, h), mm(ds, k));
      put(part(d.k, i, g), mm(T(ds), q));
      put(part(d.v, i, g), mm(T(p), dy));
    }
  return { y, d };
}
function turned(x, positions, c, sign) {
  const [, H, n, K] = x.shape, p = c.width ?? K, half = p / 2, factors = c.factors ?? [1];
  return perRow(x, (xs, i) => {
    const place = positions.shape.length === 1 ? i % n : Math.floor(i / (H * n)) * n + (i % n);
    return xs.map((v, j) => {
      if (j >= p) return v;
      const rate = c.theta ** ((-2 * (j % half)) / p) / factors[factors.length === 1 ? 0 : j % half];
      const angle = positions.d[place] * rate, other = xs[(j + half) % p];
      return f(f(v * f(Math.cos(angle))) + f((j < half ? -sign : sign) * f(other * f(Math.sin(angle)))));
    });
  });
}
export const rotary = (t, c) => ({ y: turned(t.x, t.positions, c, 1), d: { x: turned(t.dy, t.positions, c, -1) } });
export function head_norm(t, c) {
  const dy = turned(t.dy, t.positions, c, -1), { y, d } = rms_norm({ x: t.x, w: t.w, dy }, c);
  return { y: turned(y, t.positions, c, 1), d: { x: d.x, w: d.w } };
}
const t5Side = (a, n, last) => { // the bucket of a distance on one side
  const exact = n / 2;
  if (a < exact) return a;
  return Math.min(n - 1, exact + Math.floor((Math.log(a / exact) / Math.log(last / exact)) * (n - exact) + 1e-9));
};
export function score_bias(t, c) {
  const [B, H] = t.table.shape, n = c.T, b = zeros([H, n, n]), table = zeros([B, H]);
  for (let h = 0; h < H; h++)
    for (let q = 0; q < n; q++)
      for (let k = 0; k < n; k++) {
        const d = k - q, bucket = c.causal ? t5Side(Math.max(-d, 0), B, c.last) :
          t5Side(Math.abs(d), B / 2, c.last) + (d > 0 ? B / 2 : 0);
        const place = (h * n + q) * n + k, entry = bucket * H + h;
        b.d[place] = t.table.d[entry];
        table.d[entry] = f(table.d[entry] + t.db.d[place]);
      }
  return { b, d: { table } };
}
export function disentangled(t, c) {
  const [N, H, n, K] = t.q.shape, B = t.k_far.shape[1] / 2, mid = B / 2, s = f(1 / Math.sqrt(3 * K));
  const z = zeros([N, H, n, n]), d = Object.fromEntries(["q", "k", "q_far", "k_far"].map((a) => [a, zeros(t[a].shape)]));
  const rowOf = (distance) => {
    const a = Math.abs(distance), log = Math.log(a / mid) / Math.log((c.last - 1) / mid);
    const bucket = a <= mid ? a : mid + Math.ceil(log * (mid - 1) - 1e-9);
    return Math.min(2 * B - 1, Math.max(0, B - Math.sign(distance) * bucket));
  };
  for (let i = 0; i < N; i++)
    for (let h = 0; h < H; h++)
      for (let q = 0; q < n; q++)
        for (let k = 0; k < n; k++) {
          const far = h * 2 * B + rowOf(k - q), [x, y] = [q, k].map((place) => (i * H + h) * n + place);
          const dz = f(t.dz.d[x * n + k] * s);
          let score = 0;
          for (const [a, ai, b, bi] of [["q", x, "k", y], ["q", x, "k_far", far], ["k", y, "q_far", far]]) {
            const [us, vs, du, dv] = [row(t[a], ai), row(t[b], bi), row(d[a], ai), row(d[b], bi)];
            score = f(score + sum(us.map((u, j) => f(u * vs[j]))));
            us.forEach((u, j) => ((du[j] = f(du[j] + f(dz * vs[j]))), (dv[j] = f(dv[j] + f(dz * u)))));
          }
          z.d[x * n + k] = f(score * s);
        }
  return { z, d };
}
const swap = (x, H) => { // (N, n, H K) -> (N, H, n, K)
  const [N, n, D] = x.shape, K = D / H, y = zeros([N, H, n, K]);
  for (let i = 0; i < N * n * H; i++)
    row(y, (Math.floor(i / (n * H)) * H + (i % H)) * n + (Math.floor(i / H) % n)).set(x.d.subarray(i * K, (i + 1) * K));
  return y;
};
const swapBack = (x) => { // the other way round
  const [N, H, n, K] = x.shape, y = zeros([N, n, H * K]);
  for (let i = 0; i < N * H * n; i++)
    y.d.set(row(x, i), ((Math.floor(i / (H * n)) * n + (i % n)) * H + (Math.floor(i / n) % H)) * K);
  return y;
};
export function cross_attention(t, c) {
  const [q, k, v] = [[t.x, t.W_q], [t.X, t.W_k], [t.X, t.W_v]].map(([x, W]) => swap(affine(x, W), c.n_head));
  const both = (dy) => attention({ q, k, v, mask: t.source_mask, dy }, { causal: false });
  const y = swapBack(both(q).y), { d } = both(swap(mm(t.dy, t.W_o), c.n_head));
  const [dq, dk, dv] = [d.q, d.k, d.v].map(swapBack);
  return { y: affine(y, t.W_o), d: {
    x: mm(dq, t.W_q), X: add(mm(dk, t.W_k), mm(dv, t.W_v)), W_q: mm(T(dq), flat(t.x)), W_k: mm(T(dk), flat(t.X)),
    W_v: mm(T(dv), flat(t.X)), W_o: mm(T(t.dy), flat(y)),
  } };
}
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
