"""Float32 kernels for CPUs in C++, each beside a plain twin in torch (in model/ and optim/)."""
