"""What test files share: the tests of directions, modes and optimizers, and those of ``finetune``.

    counted         float64 numbers that count how often float32 arithmetic would round them
    models          a small model, closures that record, and the model's loss on counted numbers
    methods         one row for each method: constructor options, and its naive step with the contract's noise
    contract        a run beside its naive method: losses at every point, weights after every step, whatever the mode
    selection       which of the methods' runs are made where not all of them are
    recipes         optimizers in every mode, and small models that they train: what the tests of faults run
    finetune_tiny   a tiny random language model with its tokenizer, and a tiny labelled data set

Imports: contract, selection -> methods -> counted; recipes -> models -> counted.
"""
