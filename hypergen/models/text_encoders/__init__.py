"""Prompt encoding."""
