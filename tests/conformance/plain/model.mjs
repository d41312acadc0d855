// A whole transformer, forward and backward: T13, T14, T16, and LoRA in it. A part is a function of x that gives its
// result and the way back: { y, back }, where back(dy) adds to the gradients and gives dx.

import { T, add, at, cols, f, flat, linear, map, mm, mul, row, rows, scatter, take, tensor, times, total, zeros } from "./arrays.mjs";
import { merged, scale } from "./lora.mjs";
import { attention, cross_entropy, gelu, gelu_tanh, layer_norm, relu, rms_norm, rotary, silu } from "./transformer.mjs";

const like = (shape, a) => ({ shape, d: a.d });
const swap = (x, shape) => { // (a, b, c, K) -> (a, c, b, K)
  const [a, b, c, K] = shape, y = zeros([a, c, b, K]);
  for (let i = 0; i < a * b * c; i++)
    row(y, (Math.floor(i / (b * c)) * c + (i % c)) * b + (Math.floor(i / c) % b)).set(x.d.subarray(i * K, (i + 1) * K));
  return y;
};
const through = (...parts) => (x) => { // one after another
  const backs = [];
  for (const part of parts) ({ y: x, back: backs[backs.length] } = part(x));
  return { y: x, back: (dy) => backs.reduceRight((d, back) => back(d), dy) };
};
const beside = (part) => (x) => { // x + part(x)
  const { y, back } = part(x);
  return { y: add(x, y), back: (dy) => add(dy, back(dy)) };
};
const elementwise = (fn) => (x) => ({ y: fn({ x, dy: x }).y, back: (dy) => fn({ x, dy }).d.x });
const tanh = ({ x, dy }) => {
  const y = map((v) => f(Math.tanh(v)), x);
  return { y, d: { x: map((d, v) => f(d * f(1 - f(v * v))), dy, y) } };
};

const weightOf = (t, name) => (t[`${name}.weight`] ? `${name}.weight` : "embed.tokens");
function pairOf(t, c, name) { // a matrix's A, B and s, if it is adapted: of a fused B its own rows, from the row `before`
  const [stem, part] = [name.slice(0, -2), "qkv".indexOf(name.at(-1))], W = t[weightOf(t, name)];
  const fused = name.includes(".attn.") && part >= 0 && t[`${stem}.qkv.A`], pair = fused ? `${stem}.qkv` : name;
  const A = t[`${pair}.A`], whole = t[`${pair}.B`], r = A && rows(A), s = A && scale({ ...c, r });
  const before = fused ? [..."qkv"].slice(0, part).reduce((sum, one) => sum + rows(t[`${stem}.${one}.weight`]), 0) : 0;
  const B = fused ? tensor([rows(W), r], whole.d.subarray(before * r, (before + rows(W)) * r)) : whole;
  return { pair, A, B, whole, before, r, s };
}
export function merge_model(t, c) {
  const weights = Object.fromEntries(Object.entries(t).filter(([name]) => !/\.[AB]$/.test(name)));
  for (const name of ["head", ...Object.keys(t).filter((n) => n.endsWith(".weight")).map((n) => n.slice(0, -7))]) {
    const { A, B, r, s } = pairOf(t, c, name);
    if (A) weights[`${name}.weight`] = merged(t[weightOf(t, name)], A, B, r, s, c.dtype);
  }
  return weights;
}

function network(t, c) { // logits, and the way back to the gradients by every weight
  const [N, n] = t.tokens.shape, D = c.d_model, K = D / c.n_head, g = {};
  const grad = (name, value) => (g[name] = g[name] ? add(g[name], value) : value);
  const counts = (i, j) => (t.mask ? at(t.mask, i, j) : 1);
  const positions = { shape: [N, n], d: [] };
  for (let i = 0; i < N; i++) for (let j = 0, seen = 0; j < n; j++) positions.d.push(Math.max((seen += counts(i, j)) - 1, 0));

  const project = (name) => (x) => {
    const W = weightOf(t, name), { pair, A, B, whole, before, r, s } = pairOf(t, c, name);
    let y = linear(x, t[W], t[`${name}.bias`]);
    const u = A && times(mm(x, T(A)), s);
    if (A) y = add(y, mm(u, T(B)));
    return { y, back(dy) {
      grad(W, mm(T(dy), flat(x)));
      grad(`${name}.bias`, total(dy));
      if (!A) return mm(dy, t[W]);
      const v = times(mm(dy, B), s), dB = mm(T(dy), flat(u)), all = zeros(whole.shape);
      all.d.set(dB.d, before * r);
      grad(`${pair}.A`, mm(T(v), flat(x)));
      grad(`${pair}.B`, all);
      return add(mm(dy, t[W]), mm(v, A));
    } };
  };
  const norm = (name) => (x) => {
    const both = (dy) => (c.norm === "rms" ? rms_norm : layer_norm)({ x, w: t[`${name}.weight`], b: t[`${name}.bias`], dy }, c);
    return { y: both(x).y, back(dy) {
      const { d } = both(dy);
      grad(`${name}.weight`, d.w);
      grad(`${name}.bias`, d.b);
      return d.x;
    } };
  };
  const turn = (x) => ({
    y: rotary({ x, positions, dy: x }, { theta: c.rope_theta }).y,
    back: (dy) => rotary({ x, positions, dy }, { theta: c.rope_theta }).d.x,
  });
  const heads = (H) => (x) => ({
    y: swap(x, [N, n, H, K]), back: (dy) => like([N, n, H * K], swap(dy, [N, H, n, K])),
  });
  const joined = (name) => (x) => { // after keys or values of the layer's own, if there are any: (N, G, n, K) -> (N, G, P + n, K)
    const own = t[name];
    if (!own) return { y: x, back: (dy) => dy };
    const [G, P] = own.shape, y = zeros([N, G, P + n, K]), places = Array.from({ length: N * G }, (_, i) => i * (P + n) * K);
    const mine = (a, i) => a.d.subarray((i % G) * P * K, (i % G + 1) * P * K);
    const texts = (a, i) => a.d.subarray(i * n * K, (i + 1) * n * K);
    places.forEach((at, i) => (y.d.set(mine(own, i), at), y.d.set(texts(x, i), at + P * K)));
    return { y, back(dy) {
      const dx = zeros(x.shape);
      places.forEach((at, i) => {
        const d = zeros(own.shape);
        mine(d, i).set(dy.d.subarray(at, at + P * K));
        grad(name, d);
        texts(dx, i).set(dy.d.subarray(at + P * K, at + (P + n) * K));
      });
      return dx;
    } };
  };
  const seen = t.mask && c.prefix ? { // by attention: a prefix always
    shape: [N, c.prefix + n],
    d: Array.from({ length: N }, (_, i) => [...Array(c.prefix).fill(1), ...t.mask.d.slice(i * n, (i + 1) * n)]).flat(),
  } : t.mask;
  const attend = (name) => (x) => {
    const turned = c.positions === "rotary" ? [turn] : [];
    const [q, k, v] = [["q", c.n_head, turned], ["k", c.n_kv_head, turned], ["v", c.n_kv_head, []]].map(
      ([part, H, more]) => through(project(`${name}.${part}`), heads(H), ...more, joined(`${name}.prefix.${part}`))(x));
    const both = (dy) => attention({ q: q.y, k: k.y, v: v.y, mask: seen, dy }, c);
    const y = both(q.y).y, out = project(`${name}.o`)(like([N, n, D], swap(y, [N, c.n_head, n, K])));
    return { y: out.y, back(dy) {
      const { d } = both(swap(out.back(dy), [N, n, c.n_head, K]));
      return add(add(q.back(d.q), k.back(d.k)), v.back(d.v));
    } };
  };
  const gated = (name) => (x) => {
    const gate = through(project(`${name}.gate`), elementwise(silu))(x), up = project(`${name}.up`)(x);
    return { y: mul(gate.y, up.y), back: (dy) => add(gate.back(mul(dy, up.y)), up.back(mul(dy, gate.y))) };
  };
  const feed = (name) => c.activation === "silu_gated" ? through(gated(name), project(`${name}.down`)) :
    through(project(`${name}.up`), elementwise(c.activation === "gelu" ? gelu : gelu_tanh), project(`${name}.down`));
  const half = (name, f) => {
    const part = c.norm_outputs ? through(f, norm(`${name}_out`)) : f;
    return c.norm_first ? beside(through(norm(name), part)) : through(beside(part), norm(name));
  };
  const read = (x) => { // a classifier's one token a text
    const index = Array.from({ length: N }, (_, i) => {
      const true_ = [...Array(n).keys()].filter((j) => counts(i, j));
      return i * n + true_.at(c.causal ? -1 : 0);
    });
    return { y: take(flat(x), { shape: [N], d: index }),
      back: (dy) => like(x.shape, scatter(dy, { shape: [N], d: index }, flat(x))) };
  };
  const tables = { "embed.tokens": t.tokens };
  if (c.positions === "learned")
    tables["embed.positions"] = { shape: [N, n], d: positions.d.map((p) => p + c.position_offset) };
  if (t.token_types) tables["embed.types"] = t.token_types;
  const layers = [...Array(c.n_layer).keys()].flatMap((i) => [
    half(`layers.${i}.norm1`, attend(`layers.${i}.attn`)), half(`layers.${i}.norm2`, feed(`layers.${i}.mlp`))]);
  const scaled = c.head_scale ? [(x) => ({ y: times(x, c.head_scale), back: (dy) => times(dy, c.head_scale) })] : [];
  const pooled = c.causal ? [read] : [read, project("pooler"), elementwise({ tanh, gelu, relu }[c.pooler ?? "tanh"])];
  const all = through(...(c.norm_first ? layers : [norm("embed.norm"), ...layers]), ...(c.norm_first ? [norm("norm")] : []),
    ...(c.head === "classify" ? pooled : []), ...scaled, project("head"));
  const { y, back } = all(Object.entries(tables).map(([name, index]) => take(t[name], index)).reduce(add));
  return { logits: y, gradients(dlogits) {
    const dx = back(dlogits);
    for (const [name, index] of Object.entries(tables)) grad(name, scatter(dx, index, t[name]));
    return g;
  } };
}

export function model(t, c) {
  const { logits, gradients } = network(t, c), { loss, d } = cross_entropy({ logits: flat(logits), targets: t.targets });
  return { logits, loss, d: gradients(like(logits.shape, d.logits)) };
}
export function generate(t, c) {
  const texts = Array.from({ length: t.tokens.shape[0] }, (_, i) => continued(...alone(t, c, i)));
  return { tokens: { shape: [texts.length, texts[0].tokens.length], d: texts.flatMap((one) => one.tokens) },
    logits: tensor([texts.length, c.n, c.vocab_size], texts.flatMap((one) => one.logits)) };
}
function alone(t, c, i) { // one text, and its own adapter if there are some
  const one = ({ shape: [, n], d }) => ({ shape: [1, n], d: d.slice(i * n, (i + 1) * n) });
  const own = { ...t, tokens: one(t.tokens), mask: t.mask && one(t.mask) }, of = t.rows ? t.rows.d[i] : -1;
  if (of < 0) return [own, c];
  const stem = `adapters.${of}.`;
  for (const name of Object.keys(t)) if (name.startsWith(stem)) own[name.slice(stem.length)] = t[name];
  return [own, { ...c, ...c.adapters[of] }];
}
function continued(t, c) {
  const tokens = [...t.tokens.d], mask = t.mask && [...t.mask.d], chosen = [];
  for (let k = 0; k < c.n; k++) {
    const shape = [1, tokens.length], { logits } = network({ ...t, tokens: { shape, d: tokens }, mask: mask && { shape, d: mask } }, c);
    const last = [...row(logits, tokens.length - 1)];
    chosen.push(...last);
    tokens.push(last.indexOf(Math.max(...last)));
    mask?.push(1);
  }
  return { tokens, logits: chosen };
}
