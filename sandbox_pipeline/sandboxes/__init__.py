"""Sandbox providers: where forks work."""
