"""Decisions about memory, made before anything is allocated."""
