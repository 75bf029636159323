"""What the benchmark of the kernels measures: inputs, work, time and error."""
