"""What is read: the two models, and the text as documents, windows or pairs."""
