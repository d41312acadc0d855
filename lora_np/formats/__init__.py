"""Other people's files. Only here are their names known."""
