"""Prepares pictures of any kind like the digits that the network was trained on."""
