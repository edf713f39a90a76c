"""Training: settings, loop, checkpoints, logs; one process or several."""
