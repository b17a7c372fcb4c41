"""Simulates training steps on fake tensors, to know their memory and time before anything is allocated."""
