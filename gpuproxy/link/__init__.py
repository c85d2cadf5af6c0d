"""The link between a worker and control: messages and both ends of the socket."""
