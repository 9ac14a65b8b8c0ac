"""Training of the trainable tree: optimiser, losses, the step and the loop."""
