"""Benchmarks: python -m bench.

ops, step, memory, decode, held, merge, switch, load, scaling, large, peers
                         a subject each: the cases that a process times, and `figures`, which asks for them
measure, worker, timing  sides of a comparison in processes that take turns; one such process; a function's time
device, counting         the clock and the memory, the host's or a GPU's; launches and copies that a call asks of a GPU
models                   what is measured
peft_side, jax_side      the same in PyTorch + PEFT, transformers and loralib; the step in JAX
bitsandbytes_side        the step of a large base in PEFT + bitsandbytes
llama_cpp_side           a .gguf file decoded by llama.cpp
flops, roofline          the products of a step, counted; what the machine can do
figures, environment     what was found, as text and JSON, and beside another run; what it depends on
plots, readme            pictures; the table in README.md
ranks                    steps on MPI's ranks, with a command line of its own
sst2, e2e                trainings on real data beside PyTorch + PEFT, each with a command line of its own
"""
