"""Data sets, their formats, and the shard of images that a rank computes."""
