"""Publish generations of the semantic-ID table: encode, rank collisions, measure, check gates, commit, export."""
