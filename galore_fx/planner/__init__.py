"""Chooses the settings that meet a budget, keeps batches within the plan, and compares the plan with a real step."""
