"""What the Gramian of K timestep intervals costs a training step, ours and others' ways; see ``__main__``."""
