"""Rented machines: offers, their lives from intent to proof that they are gone, what they cost whom."""
