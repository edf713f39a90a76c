"""Experiments that train several networks and compare them."""
