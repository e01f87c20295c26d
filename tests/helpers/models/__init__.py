"""Model files that a user might write, added by a test."""
