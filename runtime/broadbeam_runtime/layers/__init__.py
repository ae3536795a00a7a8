"""The parts a decoder layer is made of: plain callables over tensors, no autograd."""
