"""Triton side of the noise contract. The kernels of the ops come later; nothing here is imported by default."""
