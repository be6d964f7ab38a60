"""The machine: its devices, its memory, and the BLAS that MLX computes with on Linux CPUs.

Empty on purpose: :mod:`mlx_fit.runtime.blas` has to run before MLX is imported.
"""
