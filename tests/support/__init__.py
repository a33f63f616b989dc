"""What test files share: the tests of directions, modes and optimizers, and those of ``finetune``.

    counted         float64 numbers that count how often float32 arithmetic would round them
    models          a small model, closures that record, and the model's loss on counted numbers
    methods         one row for each method: constructor options, and its naive step with the contract's noise
    contract        a run beside its naive method: losses at every point, weights after every step, whatever the mode
    finetune_tiny   a tiny random language model with its tokenizer, and a tiny labelled data set

Imports: contract -> methods -> counted, models -> counted.
"""
