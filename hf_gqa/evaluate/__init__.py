"""Floor 4: what the student costs and what it kept."""
