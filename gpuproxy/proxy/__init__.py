"""The data plane: one worker process that accepts, admits, routes, forwards and meters."""
