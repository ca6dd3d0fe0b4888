"""How a CPU computes a step's gradients faster: threads that share a batch, and traces that they replay."""
