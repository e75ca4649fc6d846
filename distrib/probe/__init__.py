"""Runs a network's layers under observation, to find the one at fault (see `distrib.check_model`)."""
