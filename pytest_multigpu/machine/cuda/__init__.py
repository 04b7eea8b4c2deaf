"""What the CUDA worker does on the GPUs; imported by the worker's process only.

torch is imported inside functions: the parent never pays for it.
"""
