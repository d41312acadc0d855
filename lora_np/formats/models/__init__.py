"""Other people's models and tokenizers, and our own in a folder."""
