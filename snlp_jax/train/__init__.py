"""Training: loss, optimizer, step, loop."""
