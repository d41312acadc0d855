"""Files as bytes that anyone may have written: read strictly, written whole or not at all."""
