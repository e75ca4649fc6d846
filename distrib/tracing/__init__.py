"""`--trace`: a timeline of some steps of all ranks."""
