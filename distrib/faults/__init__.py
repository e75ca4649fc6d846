"""Ends jobs that failed, and stops jobs on request."""
