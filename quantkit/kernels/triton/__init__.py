"""GPU kernels in Triton. Importing them needs no Triton and no GPU; calling one needs both, or Triton's interpreter."""

__all__: list[str] = []
