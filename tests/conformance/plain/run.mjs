// Plain JavaScript beside the vectors, without a package: reads them, computes what it can, writes the results.
//
//     node run.mjs VECTORS RESULTS [float64]

import fs from "node:fs";
import path from "node:path";
import * as analysis from "./analysis.mjs";
import * as dora from "./dora.mjs";
import { readTensors, writeTensors } from "./files.mjs";
import * as fourBits from "./four_bits.mjs";
import * as lora from "./lora.mjs";
import * as model from "./model.mjs";
import * as optimizer from "./optimizer.mjs";
import * as transformer from "./transformer.mjs";

const [vectors, results] = process.argv.slice(2);
const operations = { ...lora, ...dora, ...fourBits, ...transformer, ...model, ...optimizer, ...analysis };
const files = {};
for (const { id, name, operation, scalars, inputs, expected } of
  JSON.parse(fs.readFileSync(path.join(vectors, "manifest.json"))).cases) {
  if (!operations[operation]) continue;
  const stored = readTensors(path.join(vectors, `${id}.safetensors`));
  const t = Object.fromEntries(Object.keys(inputs).map((input) => [input, stored[`${name}/in/${input}`]]));
  const { d, ...outputs } = operations[operation](t, scalars);
  for (const wanted of Object.keys(expected)) {
    const [kind, ...rest] = wanted.split("/"), found = (kind === "out" ? outputs : d)?.[rest.join("/")];
    if (found) (files[id] ??= {})[`${name}/${wanted}`] = found;
  }
}
fs.mkdirSync(results);
for (const [id, tensors] of Object.entries(files)) writeTensors(path.join(results, `${id}.safetensors`), tensors);
