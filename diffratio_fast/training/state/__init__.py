"""State of a run, its optimizers, averages and checkpoints."""
