"""What ends a job that cannot go on, and how a job is asked to end."""
