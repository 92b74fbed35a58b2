"""Floor 0: the code that is shipped, file by file and byte for byte, inside every exported bundle.

Flat; each file imports only the standard library, torch, transformers, huggingface_hub and its siblings.
"""
