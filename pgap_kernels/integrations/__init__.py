"""Zeroth-order steps in the training frameworks that people have; each module needs the library that it is named after.

    transformers   ``ZOTrainer``, and ``ZOTrainerMixin`` for other Trainers (TRL's too)
    lightning      ``ZOLightningMixin`` for a LightningModule

Nothing else in the package imports them. Imports: transformers -> arguments, ranks, and lightning -> ranks.
"""
