"""Data sets, their formats, and which images a rank computes."""
