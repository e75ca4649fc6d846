"""Joins the ranks, and sums arrays over them."""
