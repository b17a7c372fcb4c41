"""What a call of the model or of one of its blocks runs, and what is refused."""
