"""Bytes that are counted or read while a model trains."""
