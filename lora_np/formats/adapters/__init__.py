"""Adapters in PEFT's format, loralib's and our own."""
