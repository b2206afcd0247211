"""One step of training: from (state, step, batch) to the next state."""
