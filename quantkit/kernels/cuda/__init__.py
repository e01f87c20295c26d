"""GPU kernels in CUDA C++, built by nvcc on first use and called through ctypes."""

__all__: list[str] = []
