"""Transcripts of the forwarder: bytes in, bytes out, then the receipt."""
