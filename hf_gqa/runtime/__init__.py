"""Floor 0: the code that is shipped, file by file and byte for byte, inside every exported bundle.

Flat; each file imports only the standard library, torch, transformers, huggingface_hub and its siblings. Every
`modeling_gqa_*` file imports from each sibling that it needs, through others too: transformers before 5.10 fetches only
the files that the first one names.
"""
