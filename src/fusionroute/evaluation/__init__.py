"""Evaluation: the tasks, the systems under test, and the checking of what they answered."""
