"""Graph in, graph (or data) out: the passes over the model's graph, the optimizer's graph, and the memory plan."""
