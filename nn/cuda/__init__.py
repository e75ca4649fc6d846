"""The GPU wing: CUDA kernels, cuDNN and the backend on CuPy. Nothing else in `nn` imports it."""
