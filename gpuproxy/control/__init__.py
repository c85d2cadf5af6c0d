"""The control plane: the management API, the link server and the journal reader, in one process."""
