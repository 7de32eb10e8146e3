"""What a GPU, and several of them, need: kernels, master weights, the memory plan, torchrun."""
