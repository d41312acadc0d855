// What is measured of updates: A1, A2.

import { T, f, mm, rows, tensor, times } from "./arrays.mjs";
import { scale } from "./lora.mjs";
import { directions, dot, first, norm, turned } from "./singular.mjs";

export function subspace_similarity(t) {
  const [U, V] = [t.A, t.other].map((a) => directions(a, rows(a))), shared = mm(U, T(V)), [r, q] = shared.shape;
  const phi = Array.from({ length: r * q }, (_, n) => {
    const [i, j] = [Math.floor(n / q) + 1, (n % q) + 1], leading = first(shared, i).d.filter((_, m) => m % q < j);
    return f(dot(leading, leading) / Math.min(i, j));
  });
  return { phi: tensor([r, q], phi) };
}
export function amplification(t, c) {
  const dW = times(mm(t.B, t.A), scale(c)), [U, V] = [T(dW), dW].map((a) => directions(a, c.r));
  const [update, in_update, in_weight] = [dW, mm(mm(U, t.W0), T(V)), first(turned(t.W0), c.r)].map(norm);
  const outputs = { update, in_update, in_weight, factor: f(update / in_update) };
  return Object.fromEntries(Object.entries(outputs).map(([name, x]) => [name, tensor([], [x])]));
}
