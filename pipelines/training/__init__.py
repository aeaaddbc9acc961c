"""Training stages, and what they run on every worker."""
