"""Who is calling: accounts, keys and what they may do."""
