"""Images and labels: the built-in ones, and those of folders."""
