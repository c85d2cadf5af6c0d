"""Money that comes in by payment providers and goes back: payments, refunds, disputes, renewals."""
