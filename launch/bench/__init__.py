"""`distrib bench`: speed on real data, against PyTorch on the same work in the same run."""
