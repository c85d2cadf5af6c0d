"""What happened, and telling who wants to know."""
