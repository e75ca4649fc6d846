"""What a run leaves behind: its folder, checkpoints, and what a person sees of it."""
