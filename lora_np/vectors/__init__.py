"""Conformance vectors: cases, in a form that any language reads, that say whether an implementation of LoRA is right.

`lora-np vectors --out DIR` writes a file of safetensors for each id of the specification, and manifest.json:

    schema, version   1, v2: of this layout, and of the cases
    digest            SHA-256 of schema, version, cases, shapes, scalars and the bytes of the inputs: the same on every
                      machine
    layout            what the tensors' names mean
    statements        by id: title, and the SHA-256 of the statement's text, so that one text is told from another
    operations        by name: title, equation, and the inputs, outputs and scalars in words, the shape first
    cases             a list: id, name, operation, title, scalars (by name), inputs and expected (each a shape by name).
                      A scalar that is not there has the value that changes nothing: no prefix, one shard

In L4.safetensors, for the case "bias":

    bias/in/x               an input: F32, I64 or BOOL. Floats are exact in float32
    bias/out/h              an output, F64 or I64
    bias/grad/A             the gradient of the loss by the input A, F64. The loss is the output `loss`, or else the sum
                            of dh * h with the input dh
    bias/float32/out/h      the same, rounded to F32; so for gradients
    bias/bound/out/h        F32: by how much each element may differ in float32. 0: not at all. In float64: 2^-28 of it

Results are a folder with files of the same names, and in them bias/out/h and bias/grad/A in the precision that they
were computed in: `lora-np conform RESULTS_DIR` compares, and says what is missing. Ids, names and what stands under
them do not change within a version; a later one has all cases of those before, and its own. `--version v1` writes an
earlier one, and `conform` reads any.

`--precision bfloat16`, float16 or tf32 writes those of that precision (P1, `precision`): inputs that it has, bounds of
results in it, and in the manifest what it is, how the inputs were made, and which cases are left out, and why. Results
may be BF16, F16 or F32.

Beside the ids stand folders of adapters as files, for what reads them, each with a manifest. `files`: tiny bases, with
adapters as PEFT saves them, and what each adds to which tensor. `refusals`: adapters with one thing wrong, which a
loader must refuse, with an error before it gives anything. Results of them are files.safetensors and refusals.json,
which `lora-np conform` judges too.

Scalars are computed in float64 and rounded where they meet an array. The bounds (`tracked`) are derived: an
implementation in any order of sums, with fused operations or without, stays within them if its elementary functions
are good to 4 ulp, erf to an absolute 2^-20, and its singular value decompositions exact for a matrix within
8 max(n, m) u sigma_1 of the given one, their directions orthonormal to within 8 max(n, m) u. A whole model's is 8 times
the farthest of 16 evaluations with random roundings; PyTorch comes to an eighth of it. Expected values come from the
package, in float64; they depend on BLAS and CPU in the last bits.

What these bounds let by: decompositions that are good to 1 u are not told from those that are good to 8 max(n, m) u. In
A1 phi may be off by 3e-5, in A2 the factor by 2e-4, in L9 an element of what is truncated by 5e-5.
"""
