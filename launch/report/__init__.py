"""`distrib report` and `distrib reproduce`: what runs left, as pages and plots."""
