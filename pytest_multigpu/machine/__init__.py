"""Adapters to the machine: NVML, the CUDA worker, the host. Imports records and errors."""
