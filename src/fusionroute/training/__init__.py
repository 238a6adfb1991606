"""How a router is trained: data, annotation, losses and the training loop."""
