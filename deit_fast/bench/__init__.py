"""What `deit-fast bench` and `deit-fast tune` do; the GPUs that kernels are compiled for without having them."""
