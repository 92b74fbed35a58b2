"""What a conversion cost: losses, embeddings and written text of donor and student, with intervals."""
