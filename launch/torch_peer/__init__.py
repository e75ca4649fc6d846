"""The same network and training in PyTorch, which is optional: for parity tests and benchmarks."""
