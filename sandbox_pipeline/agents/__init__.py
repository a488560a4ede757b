"""Agents: what works on the prompt."""
