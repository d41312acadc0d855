// Arrays { shape, d } of one precision, the last axis a row. In float32 every result is rounded as it arises.

export const dtype = process.argv[4] ?? "float32";
export const [Floats, f] = dtype === "float64" ? [Float64Array, (x) => x] : [Float32Array, Math.fround];

export const tensor = (shape, d) => ({ shape, d: Floats.from(d) });
export const zeros = (shape) => ({ shape, d: new Floats(shape.reduce((a, b) => a * b, 1)) });
export const cols = (a) => a.shape.at(-1);
export const rows = (a) => a.d.length / cols(a);
export const map = (fn, a, ...rest) => tensor(a.shape, Array.from(a.d, (x, i) => fn(x, ...rest.map((b) => b.d[i]))));
export const add = (a, b) => map((x, y) => f(x + y), a, b);
export const mul = (a, b) => map((x, y) => f(x * y), a, b);
export const times = (a, s) => map((x) => f(x * f(s)), a);
export const row = (a, i) => a.d.subarray(i * cols(a), (i + 1) * cols(a));
export const sum = (xs) => Array.from(xs).reduce((s, x) => f(s + x), 0);
export const at = (a, ...index) => a.d[index.reduce((place, i, axis) => place * a.shape[axis] + i, 0)];

export function mm(a, b) { // (..., n) (n, m) -> (..., m)
  const [n, m] = b.shape, y = zeros([...a.shape.slice(0, -1), m]);
  for (let i = 0; i < rows(a); i++)
    for (let j = 0; j < m; j++) {
      let s = 0;
      for (let k = 0; k < n; k++) s = f(s + f(a.d[i * n + k] * b.d[k * m + j]));
      y.d[i * m + j] = s;
    }
  return y;
}
export function T(a) { // (..., n) -> (n, M)
  const [r, c] = [rows(a), cols(a)];
  return tensor([c, r], Array.from({ length: r * c }, (_, i) => a.d[(i % r) * c + Math.floor(i / r)]));
}
export const flat = (a) => tensor([rows(a), cols(a)], a.d);
export const total = (a) => tensor([cols(a)], Array.from({ length: cols(a) }, (_, j) => sum(row(T(a), j)))); // over all rows
export const perRow = (a, fn) => tensor(a.shape, Array.from({ length: rows(a) }, (_, i) => Array.from(fn(row(a, i), i))).flat());
export const plusBias = (a, b) => (b ? perRow(a, (r) => r.map((x, j) => f(x + b.d[j]))) : a);
export const linear = (x, W, b) => plusBias(mm(x, T(W)), b);
export const take = (table, index) => tensor([...index.shape, cols(table)], index.d.flatMap((i) => [...row(table, i)]));
export function scatter(dy, index, like) { // the gradient of take
  const g = zeros(like.shape);
  index.d.forEach((i, n) => row(dy, n).forEach((x, j) => (row(g, i)[j] = f(row(g, i)[j] + x))));
  return g;
}
