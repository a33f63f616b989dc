"""What the tests share: test files import from here, never from one another.

Ops:
    helpers         bits and how they are compared, random and poisoned tensors, ops with a chosen backend
    exact, bounds   float32 arithmetic on fractions; float64 values with bounds on what float32 may make of them
    cases           calls of every op, a row for each family, built anew for every backend
    sums            the products that reductions sum
    refusals        calls that must be refused
    interpreter     whether Triton's interpreter is on, and a repair of it
    agreement, lowrank_calls    calls for it
    gpu, gpu_calls  the device, and calls whose scalars live on it
    isa_digests     digests of what an instruction set computes; run as a module

Directions, modes and optimizers:
    counted         float64 numbers that count how often float32 arithmetic would round them
    models          a small model, closures that record, and the model's loss on counted numbers
    methods         one row for each method: constructor options, and its naive step with the contract's noise
    contract        a run beside its naive method: losses at every point, weights after every step, whatever the mode
    finetune_tiny   a tiny random language model with its tokenizer, and a tiny labelled data set
    tiny_families   the same of every family of transformers that can be made tiny

Imports: contract -> methods -> counted, models -> counted; refusals, gpu, agreement -> cases -> helpers;
tiny_families -> finetune_tiny.
"""
