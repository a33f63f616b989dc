"""The methods as plain float64 functions: what the optimizers are compared with.

Every ``step(weights, loss, noise..., state, *, hyper-parameters)`` returns ``(new weights, new state)`` and changes
nothing that it is given. ``loss`` is called once per forward, in the method's order, with the weights of that forward.
Noise is a dict from a tensor's name to its draw, or a list of such dicts; nothing is random here. ``state`` is ``{}``
before the first step, unless the docstring says more. lr, eps and weight_decay mean the same in every method.
"""
