"""A run's folder, its checkpoints, and its output on the terminal."""
