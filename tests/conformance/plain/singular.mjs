// Singular directions, by Jacobi's rotations of one side.

import { f, row, rows, sum, tensor } from "./arrays.mjs";

export const dot = (xs, ys) => sum(xs.map((x, j) => f(x * ys[j])));
export const norm = (a) => f(Math.sqrt(dot(a.d, a.d)));
export const first = (a, k) => tensor([k, a.shape[1]], a.d.subarray(0, k * a.shape[1]));

export function turned(a) { // its rows made orthogonal, the largest first: singular values times right-singular directions
  const y = tensor(a.shape, a.d);
  for (let sweep = 0; sweep < 12; sweep++)
    for (let p = 0; p < rows(y); p++)
      for (let q = p + 1; q < rows(y); q++) {
        const [u, v] = [row(y, p).slice(), row(y, q).slice()];
        const angle = Math.atan2(2 * dot(u, v), dot(u, u) - dot(v, v)) / 2, [c, s] = [f(Math.cos(angle)), f(Math.sin(angle))];
        row(y, p).set(u.map((x, j) => f(f(c * x) + f(s * v[j]))));
        row(y, q).set(u.map((x, j) => f(f(c * v[j]) - f(s * x))));
      }
  return y;
}
export function directions(a, k) { // the k leading right-singular directions, as rows
  const y = first(turned(a), k), sizes = Array.from({ length: k }, (_, i) => norm({ d: row(y, i) }));
  return tensor(y.shape, y.d.map((x, n) => f(x / sizes[Math.floor(n / a.shape[1])])));
}
