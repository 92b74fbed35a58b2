"""Floor 5: write the student, say what it is, and check it."""
