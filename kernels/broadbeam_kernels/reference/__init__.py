"""The oracle of each operation in plain PyTorch, in float32 or float64; it runs on any device."""
