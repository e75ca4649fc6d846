"""Who the ranks are and how they add up: the communicators and what uses them."""
