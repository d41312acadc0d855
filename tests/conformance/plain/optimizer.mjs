// The optimizer: O1 to O3.

import { f, map, sum, tensor, times } from "./arrays.mjs";

export function adamw(t, c) {
  const ema = (beta) => (old, now) => f(f(old * f(beta)) + f(now * f(1 - beta)));
  const m = map(ema(c.beta1), t.m, t.g), v = map((old, g) => ema(c.beta2)(old, f(g * g)), t.v, t.g);
  const [c1, c2] = [f(1 - c.beta1 ** c.step), f(1 - c.beta2 ** c.step)];
  const p = map((p, m, v) => {
    const by = f(f(m / c1) / f(f(Math.sqrt(f(v / c2))) + f(c.eps)));
    return f(p - f(f(c.lr) * f(by + f(f(c.weight_decay) * p))));
  }, t.p, m, v);
  return { p, m, v };
}
export const warmup_cosine = (t, { warmup, total }) => ({
  factor: tensor(t.steps.shape, t.steps.d.map((n) =>
    n < warmup ? (n + 1) / warmup : (1 + Math.cos(Math.PI * Math.min(1, (n - warmup) / (total - warmup)))) / 2)),
});
export function clip(t, c) {
  const norm = f(Math.sqrt(sum(Object.values(t).flatMap((g) => [...g.d].map((x) => f(x * x))))));
  const by = Math.min(1, f(c.max_norm / norm));
  return { norm: tensor([], [norm]), ...Object.fromEntries(Object.entries(t).map(([n, g]) => [`clipped_${n}`, times(g, by)])) };
}
