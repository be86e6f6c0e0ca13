"""What `deit-fast bench` measures, and the GPUs that kernels are compiled for without having them."""
