"""Real clients and real servers through a whole gateway."""
