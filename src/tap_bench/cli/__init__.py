"""The commands that the bench adds to ``tap``, a file for each."""
