"""Code that runs in ranks; each module also runs as a script."""
