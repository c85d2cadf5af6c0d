"""Money and usage: the double-entry book and the receipts that feed it."""
